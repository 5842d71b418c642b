"""Find the linear layers of a decoder's blocks: among the tensors of its files, and in the model in memory.

Files and models name them differently: in the files of a multimodal Gemma 3 the decoder is `language_model.model`, and
in memory `model.language_model`.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sails_align.core.errors import InputError
from sails_align.edits.weights import Weights
from sails_align.initializers.targets import SIDES
from sails_align.models.hooks import decoder_layers
from sails_align.models.load import load_causal_lm

PATHS = tuple(SIDES)
WRITERS = tuple(path for path, side in SIDES.items() if side == "B")
"""Those whose outputs are added to the residual stream."""
_NAME = re.compile(r"(?P<before>.*\.)?layers\.(?P<block>\d+)\.(?P<path>.+)\.weight")


@dataclass(frozen=True)
class Place:
    """A linear layer of the decoder."""

    block: int
    path: str
    """Within the block, one of `PATHS`."""

    def of(self, model: nn.Module) -> nn.Linear:
        """Return it in a model."""
        module = decoder_layers(model)[self.block].get_submodule(self.path)
        assert isinstance(module, nn.Linear), f"{self} is a {type(module).__name__}"
        return module


def linears_of(weights: Weights, paths: Collection[str] = PATHS) -> dict[str, Place]:
    """Return the tensors that are weights of linear layers at the given paths, with their places.

    Raises `InputError` if one of the paths is missing in a block: the architecture is another one.
    """
    found = {}
    for name in weights.names:
        match = _NAME.fullmatch(name)
        if match is not None and match["path"] in paths and "vision" not in (match["before"] or ""):
            found[name] = Place(int(match["block"]), match["path"])
    n_blocks = weights.config.get_text_config(decoder=True).num_hidden_layers
    missing = {Place(block, path) for block in range(n_blocks) for path in paths} - set(found.values())
    if missing:
        first = min(missing, key=lambda place: (place.block, place.path))
        raise InputError(
            f"{weights.spec.name} has no {first.path} in block {first.block}: its architecture "
            f"({weights.config.model_type}) is not supported;\ngive a Gemma, Llama, Qwen or Mistral model"
        )
    return found


def set_weight(layer: nn.Linear, weight_OI: Tensor) -> None:
    """Give a layer other weights; not a copy, if they are of its type and on its device: they are large."""
    layer.weight.data = weight_OI.to(layer.weight)


def dense_model(weights: Weights, device: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a model in evaluation mode, with its adapter's updates in its weights.

    Raises `InputError` if the device has too little memory, or the model's linear layers are not plain ones.
    """
    spec = weights.spec
    where = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    model = load_causal_lm(spec.base, dtype=dtype, **where)
    places = linears_of(weights) if weights.updated else {}
    other = [name for name in weights.updated if name not in places]
    if other:
        raise InputError(
            f"the adapter in {spec.adapter} updates {other[0]};\nmerge it first (sails merge), and edit that"
        )
    with torch.no_grad():
        for name in weights.updated:
            places[name].of(model).weight.copy_(weights.get(name))
    try:
        return model.to(device).eval()  # pyright: ignore[reportArgumentType]
    except torch.OutOfMemoryError as error:
        raise InputError(f"{spec.name} does not fit on {device}; use --device cpu") from error
