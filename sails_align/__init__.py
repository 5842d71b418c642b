"""SAILS: safety alignment in a sparse-autoencoder-identified low-rank subspace (arXiv 2512.23260)."""

import logging

# PEFT imports bitsandbytes wherever it is installed, and that warns of a kernel for CPUs that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Its prompts, its judge and its wrappers are registered, by name; it imports nothing heavy.
import sails_align.testbed  # noqa: E402, F401
