"""Train adapters without gradients, and with differential privacy if asked to (`--zeroth_order true`)."""
