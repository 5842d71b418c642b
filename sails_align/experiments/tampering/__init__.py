"""Tamper with aligned models: train them further, and measure what safety is left, with and without a defence."""
