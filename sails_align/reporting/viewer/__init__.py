"""A page to browse the responses and verdicts of an evaluation, or of two side by side."""
