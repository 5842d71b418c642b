"""Compare all systems of the family: what each does to safety, helpfulness, and what is left after tampering."""
