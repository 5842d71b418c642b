"""Datasets: loaded, brought into one form, changed, tokenized.

Datasets that come with the package are registered here by layers above: by name, and by the model that they are for.
"""

from sails_align.core.registry import Entry, Registry

EMBEDDED: Registry[Entry] = Registry("dataset of the package", {})
"""Each is a function `rows(split)` of a list of rows, or None if there is no such split."""

OF_MODELS: Registry[Entry] = Registry("data of a model", {})
"""Data that comes with models. Each is a function of a model's name or folder, and returns normalized rows of harmful
requests (refused) and of harmless ones (answered), or None if the model is not its own."""
