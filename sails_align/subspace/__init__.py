"""The method: sparse-autoencoder features -> safety subspace -> adapter initialisation."""
