"""Keep units of the model as they are while the rest is trained (`--freeze_units`).

SSAH (arXiv 2410.10862) freezes the units that carry safety in further training, or trains only redundant ones. A unit
is a channel: columns of the linear modules that read it, and rows of those that write it (`units.layout`). With all
weights these entries keep their values; with an adapter, lora_A's columns and lora_B's rows are zero there, so that
the update B @ A does not touch them.

`frozen` says how the values are kept.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import Trainer

from sails_align.core.errors import InputError
from sails_align.core.log import say
from sails_align.models.hooks import decoder_layers
from sails_align.training.callbacks.frozen import Frozen, FrozenSlices
from sails_align.training.callbacks.options import FreezeUnitsOptions
from sails_align.units.layout import MODULES, columns_and_rows, n_channels
from sails_align.units.sets import Units


def attach(trainer: Trainer, init: object, plan: Any) -> None:
    """Add the callback to trainings that ask for it."""
    options = plan.of(FreezeUnitsOptions)
    if options.freeze_units is None:
        return
    model, units = trainer.model, Units.load(Path(options.freeze_units))
    assert model is not None
    only = options.trained_units is not None
    chosen = units.chosen(options.trained_units or options.frozen_units)
    frozen = {key: ~chosen_C if only else chosen_C for key, chosen_C in chosen.items()}
    parts = freeze_units(model, frozen, rest=only)
    n_frozen = int(sum(frozen_C.sum() for frozen_C in frozen.values()))
    say(f"    {n_frozen:,} of {len(units):,} units are frozen{', and all weights outside of units' * only}")
    trainer.add_callback(Frozen("freeze_units", parts))


@torch.no_grad()
def freeze_units(model: nn.Module, frozen: Mapping[str, Tensor], *, rest: bool = False) -> list[FrozenSlices]:
    """Return the slices of a model's parameters that belong to frozen units. Those of an adapter are set to zero.

    Args:
        model: with or without a LoRA adapter whose product is zero.
        frozen: which channels (C,) of each group are frozen (`units.layout.key_of`).
        rest: without an adapter, exclude from training all parameters that are outside of units.

    Raises:
        InputError: if the units are of another model, or an adapter is on modules that have no units.
    """
    _check_sizes(model, frozen)
    parts, seen = [], set()
    for index, block in enumerate(decoder_layers(model)):
        own = {key.partition(".")[2]: frozen_C for key, frozen_C in frozen.items() if key.startswith(f"{index}.")}
        for path in MODULES:
            module = block.get_submodule(path)
            seen.add(module)
            parts += _parts(module, *columns_and_rows(block, path, own), adapted=isinstance(model, PeftModel))
    if isinstance(model, PeftModel):
        others = [name for name, each in model.named_modules() if isinstance(each, LoraLayer) and each not in seen]
        if others:
            raise InputError(f"there is an adapter on {others[0]}, which has no units; leave it out of the modules")
        for part in parts:
            part.zero_(part.parameter.data)
    elif rest:
        inside = {id(module.weight) for module in seen}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in inside)
    return parts


def _check_sizes(model: nn.Module, frozen: Mapping[str, Tensor]) -> None:
    sizes, wanted = n_channels(model), {key: len(frozen_C) for key, frozen_C in frozen.items()}
    other = next((key for key in {**sizes, **wanted} if sizes.get(key) != wanted.get(key)), None)
    if other is not None:
        raise InputError(
            f"the units are of another model: of {other} it has {wanted.get(other, 0)} channels, and this one "
            f"{sizes.get(other, 0)};\ngive those that sails units found in this model"
        )


def _parts(module: nn.Module, columns_C: Tensor, rows_O: Tensor | None, *, adapted: bool) -> list[FrozenSlices]:
    """Return the frozen slices of a linear module: of its weight and bias, or of its adapter."""
    chosen: list[tuple[nn.Parameter, dict[int, Tensor | None]]] = []
    if adapted:
        if isinstance(module, LoraLayer):
            (adapter,) = module.active_adapters
            sides = {"lora_A": {1: columns_C}, "lora_B": {0: rows_O}}
            chosen = [(module.get_parameter(f"{side}.{adapter}.weight"), places) for side, places in sides.items()]
    else:
        chosen = [(module.get_parameter("weight"), {1: columns_C, 0: rows_O})]
        if getattr(module, "bias", None) is not None:
            chosen.append((module.get_parameter("bias"), {0: rows_O}))
    found = []
    for parameter, masks in chosen:
        places = {d: mask.nonzero().squeeze(1).to(parameter.device) for d, mask in masks.items() if mask is not None}
        if places := {dim: index for dim, index in places.items() if len(index)}:
            found.append(FrozenSlices(parameter, places))
    return found
