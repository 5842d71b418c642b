"""Datasets: loaded, brought into one form, changed, tokenized.

Datasets that come with the package are registered here by name, by layers above.
"""

from sails_align.core.registry import Entry, Registry

EMBEDDED: Registry[Entry] = Registry("dataset of the package", {})
"""Each is a function `rows(split)` of a list of rows, or None if there is no such split."""
