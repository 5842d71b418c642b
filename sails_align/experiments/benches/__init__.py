"""The models that studies train further: the testbed's and SmolLM2, with rows to train on and how to measure them."""
