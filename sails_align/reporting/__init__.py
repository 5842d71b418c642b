"""Results -> figures and pages that people read."""
