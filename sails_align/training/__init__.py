"""Training with TRL, and what is kept of it."""
