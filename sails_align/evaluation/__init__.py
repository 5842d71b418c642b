"""Responses, verdicts, and rates with intervals."""
