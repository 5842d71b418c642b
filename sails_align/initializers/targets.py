"""Decide which modules take directions of the residual stream, through which LoRA factor, from which layer.

Index: layer l of a subspace is the output of block l. A writer (o, down) of block l writes to it, so it takes the
directions of layer l; a reader (q, k, v, gate, up) of block l reads the output of block l - 1, so it takes those of
layer l - 1. Block 0 reads the embeddings, layer -1, which no SAE describes: `nearest` falls back on the first SAE.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from sails_align.core.errors import InputError
from sails_align.core.options import check_choice
from sails_align.models.hooks import decoder_layers
from sails_align.subspace.basis import Subspace

LayerMap = Literal["nearest", "sae_only", "from_onset"]
Side = Literal["A", "B"]

SIDES: dict[str, Side] = {
    "self_attn.q_proj": "A",
    "self_attn.k_proj": "A",
    "self_attn.v_proj": "A",
    "self_attn.o_proj": "B",
    "mlp.gate_proj": "A",
    "mlp.up_proj": "A",
    "mlp.down_proj": "B",
}
"""The modules of a block that can be initialized, and the LoRA factor that touches the residual stream."""


@dataclass(frozen=True)
class Target:
    """A LoRA layer and its place in the decoder."""

    name: str
    "Of the module within the PEFT model."
    block: int
    path: str
    "Of the module within the block, one of `SIDES`."
    module: LoraLayer


def source_layer(
    block: int, path: str, layers: Collection[int], layer_map: LayerMap, onset: int | None = None
) -> int | None:
    """Return the layer of the subspace whose directions a module takes; None if it gets no adapter.

    Args:
        block: index of the decoder block.
        path: of the module within it, one of `SIDES`.
        layers: of the subspace.
        layer_map: "nearest" takes the closest layer (of two equally close, the earlier); "sae_only" only the very one;
            "from_onset" the closest, in blocks from the onset on.
        onset: of the subspace; None: all blocks are.
    """
    if layer_map == "from_onset" and onset is not None and block < onset:
        return None
    wanted = block - 1 if SIDES[path] == "A" else block
    if layer_map == "sae_only":
        return wanted if wanted in layers else None
    return min(layers, key=lambda layer: (abs(layer - wanted), layer))


def target_modules_for(
    model: nn.Module, module_names: Sequence[str], subspace: Subspace, layer_map: LayerMap
) -> list[str]:
    """Return `LoraConfig.target_modules` for those of the named modules that the layer map gives directions to.

    The names are returned as they are if they select just these modules of the decoder; otherwise (`sae_only`) each
    module is named in full. A multimodal model needs `language_model.outside_decoder` as `exclude_modules`, too.

    Args:
        model: the base model, before `get_peft_model`.
        module_names: as in `LoraConfig.target_modules`: ["q_proj", "o_proj", ...].
        subspace: of this model.
        layer_map: see `source_layer`.

    Raises:
        InputError: if a name is not supported or not in the model (such as fused ones), or no module is left.
    """
    check_choice("layer_map", layer_map, get_args(LayerMap))
    blocks = [dict(block.named_modules()) for block in decoder_layers(model)]
    paths = _paths(module_names, blocks, type(model).__name__)
    names = {id(module): name for name, module in model.named_modules()}
    wanted = [
        names[id(block[path])]
        for index, block in enumerate(blocks)
        for path in paths
        if source_layer(index, path, subspace.bases, layer_map, subspace.onset) is not None
    ]
    if not wanted:
        raise InputError(
            f"with layer_map sae_only, no {' or '.join(module_names)} touches one of the SAE layers "
            f"{', '.join(map(str, subspace.bases))} (modules that read belong to the block after it);\n"
            "add o_proj, or use layer_map nearest"
        )
    selected = {names[id(module)] for block in blocks for module in block.values()}
    selected = {name for name in selected if _last(name) in module_names}
    return list(module_names) if selected == set(wanted) else wanted


def find_targets(model: PeftModel, adapter_name: str) -> list[Target]:
    """Find the LoRA layers of an adapter.

    Raises `InputError` if one of them is not at a supported place in the decoder.
    """
    blocks = decoder_layers(model)
    places = {id(m): (index, path) for index, block in enumerate(blocks) for path, m in block.named_modules()}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.r]
    unknown = [name for name, module in layers if places.get(id(module), (0, ""))[1] not in SIDES]
    if unknown:
        others = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise InputError(
            f"cannot initialize the adapters on {', '.join(unknown[:3])}{others}:\n"
            f"supported are {', '.join(SIDES)} of the decoder's blocks;\n"
            "give LoraConfig the target_modules that `target_modules_for` returns, and the exclude_modules of "
            "`outside_decoder`"
        )
    return [Target(name, *places[id(module)], module) for name, module in layers]


def _paths(module_names: Sequence[str], blocks: Sequence[dict[str, nn.Module]], model_name: str) -> list[str]:
    """Return the paths of the named modules within a block. Each must be supported and in every block."""
    paths = [path for path in SIDES if _last(path) in module_names]
    missing = sorted(set(module_names) - {_last(path) for path in SIDES})
    missing += [path for path in paths if not all(path in block for block in blocks)]
    if missing or not paths:
        found = [path for path, module in blocks[0].items() if isinstance(module, nn.Linear)]
        raise InputError(
            f"cannot initialize adapters on {', '.join(missing) or 'no modules'} of {model_name}:\n"
            f"supported are {', '.join(SIDES)};\nlinear modules in its first block are {', '.join(found) or 'none'}"
        )
    return paths


def _last(name: str) -> str:
    return name.rpartition(".")[2]
