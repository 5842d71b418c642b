"""Find the safety subspace from SAE features."""
