"""Compare the methods that align a model: safety, helpfulness, and what is left after tampering."""
