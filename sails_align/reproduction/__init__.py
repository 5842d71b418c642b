"""Reproducing the paper: the plan, what it will cost, and what can be checked before it starts."""
