"""Tensors in temporary files: as many as a model has fit beside it, because the system may take their pages back.

The files are gone from their folder at once, and from the disk with the tensors.
"""

from tempfile import NamedTemporaryFile

import torch
from torch import Tensor


def zeros_in_file(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return zeros of a shape and type, in a file."""
    with NamedTemporaryFile() as file:
        return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=dtype).view(shape)


def in_file(values: Tensor) -> Tensor:
    """Return a copy of values in a file."""
    return zeros_in_file(values.shape, values.dtype).copy_(values)
