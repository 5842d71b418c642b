"""The testbed: a small world with its own model, sparse autoencoders and oracle."""
