"""Tensors in temporary files: as many as a model has fit beside it, because the system may take their pages back.

The files are gone from their folder at once, and from the disk with the tensors.
"""

import os
from tempfile import NamedTemporaryFile, gettempdir

import torch
from torch import Tensor

from sails_align.core.errors import InputError


def zeros_in_file(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return zeros of a shape and type, in a file. Raises `InputError` if the disk has no room for them."""
    size = shape.numel() * dtype.itemsize
    with NamedTemporaryFile() as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))  # on a full disk, a later write would end the process
        except OSError as error:
            raise InputError(
                f"cannot write a temporary file of {size:,} bytes in {gettempdir()}: {error.strerror};\n"
                "free some space, or name a folder on another disk in the environment variable TMPDIR"
            ) from error
        return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=dtype).view(shape)


def in_file(values: Tensor) -> Tensor:
    """Return a copy of values in a file."""
    return zeros_in_file(values.shape, values.dtype).copy_(values)
