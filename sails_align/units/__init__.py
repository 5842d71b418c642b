"""Units of a model that matter for safety, for utility, for both or for neither (SSAH, arXiv 2410.10862)."""
