"""Save what a sparse training changed: for each parameter the indices of the trained entries, and their values.

The values are the trained weights, not differences: in floating point, base + (trained - base) need not be the trained
weight. So the base with the values written into it is the trained model, bit for bit.

sparse_delta.safetensors   NAME.indices (N,) into the flattened parameter NAME, NAME.values (N,)
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sails_align.core.errors import InputError

FILE = "sparse_delta.safetensors"


def save_delta(path: Path, parameters: Mapping[str, nn.Parameter], indices: Mapping[str, Tensor]) -> None:
    """Save the entries of named parameters at flat indices (N,)."""
    tensors = {}
    for name, index_N in indices.items():
        values = parameters[name].detach().flatten()
        tensors[f"{name}.indices"] = narrow(index_N, len(values)).cpu()
        tensors[f"{name}.values"] = values[index_N.to(values.device)].cpu()
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private


@torch.no_grad()
def apply_delta(model: nn.Module, path: Path) -> None:
    """Write the entries of a delta file into the model that the training started from.

    Raises:
        InputError: if there is no such file, or it is damaged or of another model; the model is then as it was.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path} ({error}); give the {FILE} of a run") from error
    parameters = dict(model.named_parameters())
    names = [name.removesuffix(".indices") for name in tensors if name.endswith(".indices")]
    if {f"{name}.{part}" for name in names for part in ("indices", "values")} != tensors.keys():
        raise InputError(f"{path} is no {FILE}: it has other tensors than indices and values; give the one of a run")
    for name in names:
        index_N, values_N = tensors[f"{name}.indices"], tensors[f"{name}.values"]
        if index_N.is_floating_point() or index_N.shape != values_N.shape or index_N.dim() != 1:
            raise InputError(f"{path} is damaged: indices and values of {name} do not fit; copy it again")
        n = parameters[name].numel() if name in parameters else 0
        if len(index_N) and not 0 <= index_N.min() <= index_N.max() < n:
            raise InputError(f"{path} is of another model: it has entries of {name} that this one lacks")
    for name in names:
        flat = parameters[name].data.view(-1)
        index_N, values_N = tensors[f"{name}.indices"].long(), tensors[f"{name}.values"]
        flat[index_N.to(flat.device)] = values_N.to(flat)


def narrow(index_N: Tensor, n: int) -> Tensor:
    """Return indices into n entries in the smallest type that holds them: 4 bytes for almost all matrices."""
    return index_N.to(torch.int32 if n <= torch.iinfo(torch.int32).max else torch.int64)
