"""SAILS: safety alignment in a sparse-autoencoder-identified low-rank subspace (arXiv 2512.23260)."""
