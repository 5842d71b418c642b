"""Initialize LoRA adapters inside a subspace of the residual stream, without changing the model's output.

A module that reads the residual stream (q, k, v, gate, up) takes the directions as rows of `lora_A`, with `lora_B` = 0;
one that writes to it (o, down) takes them as columns of `lora_B`, with `lora_A` = 0. Either way B @ A = 0.

Shapes: D d_model, R rank.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import gather_params_ctx
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from sails_align.core.errors import InputError
from sails_align.core.linalg import complete_basis
from sails_align.core.options import check_choice
from sails_align.initializers.targets import SIDES, LayerMap, Side, Target, find_targets, source_layer
from sails_align.models.hooks import decoder_layers
from sails_align.models.norms import norm_gain
from sails_align.subspace.basis import Subspace


@dataclass(frozen=True)
class ModuleInit:
    """How one module was initialized."""

    name: str
    "Of the module within the PEFT model."
    side: Side
    "The factor that took the directions; the other one is zero."
    source_layer: int
    "The layer of the subspace that they came from."
    rank: int
    n_directions: int
    "How many of the `rank` directions are the subspace's: the first ones. The others are random, orthogonal to them."


@dataclass(frozen=True, eq=False)
class AdapterInit:
    """How an adapter was initialized, for the callbacks that watch or constrain it."""

    adapter_name: str
    modules: tuple[ModuleInit, ...]
    initial: dict[str, torch.Tensor]
    "Module name -> initial value of the side that took the directions: (R, D) for A, (D, R) for B, float32."

    def factor(self, model: torch.nn.Module, module: ModuleInit, side: str) -> torch.nn.Parameter:
        """Return lora_A (R, in) or lora_B (out, R) of a module."""
        return model.get_parameter(f"{module.name}.lora_{side}.{self.adapter_name}.weight")

    def __repr__(self) -> str:
        layers = sorted({module.source_layer for module in self.modules})
        return (
            f"{type(self).__name__}: {len(self.modules)} modules of adapter {self.adapter_name!r} in the directions of "
            f"layers {', '.join(map(str, layers))}"
        )


@torch.no_grad()
def initialize(
    model: PeftModel | PeftMixedModel | PreTrainedModel,
    subspace: Subspace,
    *,
    freeze: bool | Literal["readers"] = False,
    layer_map: LayerMap = "nearest",
    fold_norm: bool = False,
    scale: float = 1.0,
    seed: int = 0,
    adapter_name: str = "default",
) -> AdapterInit:
    """Initialize a fresh LoRA adapter in a subspace, in place. The model computes what it did before.

    A basis with more directions than a module's rank gives its first ones; one with fewer is filled with random ones,
    orthogonal to it and the same on every process (a zero pair of row and column would never get a gradient).

    Args:
        model: of `peft.get_peft_model`, with an untrained plain LoRA adapter, of any `rank_pattern`.
        subspace: of this model.
        freeze: True keeps the factors that take the directions from training; "readers" only those of modules that read
            the residual stream (q, k, v, gate, up).
        layer_map: see `targets.source_layer`.
        fold_norm: divide by the gain of the RMSNorm between the residual stream and the module, so that the intended
            direction is read or written. The directions are then no longer orthogonal to each other.
        scale: norm of each direction.
        seed: of the random directions.
        adapter_name: as in PEFT.

    Returns:
        how each module was initialized: what the callbacks `DriftCallback` and `SubspaceDecay` take.

    Raises:
        InputError: if the adapter is not plain LoRA, is not zero, does not fit the subspace, or touches modules that
            are not supported or (with "sae_only") have no SAE. Nothing is written then.

    Examples:
        >>> adapted = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "o_proj"]))
        >>> init = sails.initialize(adapted, subspace, freeze="readers")
        >>> adapted.get_nb_trainable_parameters()
        (23040, 817536)
    """
    if not isinstance(model, PeftModel):
        raise InputError(
            f"{type(model).__name__} has no adapter; make one with peft.get_peft_model(model, LoraConfig())"
        )
    _check_values(freeze, layer_map, scale)
    _check_lora(model, adapter_name)
    blocks = decoder_layers(model)
    _check_layers(subspace, len(blocks))
    targets = find_targets(model, adapter_name)
    _check_zero(targets, adapter_name)
    plan = [_plan(target, subspace, layer_map, adapter_name) for target in targets]
    gains = [norm_gain(blocks[target.block], target.path) if fold_norm else None for target in targets]
    initial = {}
    # DPO's precomputed log-probabilities need DeepSpeed's engine, and so ZeRO-3 may have split the adapter by now.
    with gather_params_ctx([p for target in targets for p in _factors(target.module, adapter_name)], modifier_rank=0):
        for target, init, gain_D in zip(targets, plan, gains, strict=True):
            generator = torch.Generator().manual_seed(_seed(seed, target))
            directions_DR = complete_basis(_basis(subspace, init.side, init.source_layer).cpu(), init.rank, generator)
            if gain_D is not None:
                directions_DR = directions_DR / gain_D[:, None]
            initial[init.name] = _write(target.module, init.side, adapter_name, scale * normalize(directions_DR, dim=0))
    freeze_factors(targets, freeze, adapter_name)
    return AdapterInit(adapter_name, tuple(plan), initial)


def _check_values(freeze: bool | str, layer_map: str, scale: float) -> None:
    check_choice("layer_map", layer_map, get_args(LayerMap))
    if freeze not in (False, True, "readers"):
        raise InputError(f"freeze is {freeze!r}; choose True, False or 'readers'")
    if not 0 < scale < float("inf"):
        raise InputError(f"scale is {scale}; choose a value above 0 (with 0 the adapter would never get a gradient)")


def _check_layers(subspace: Subspace, n_blocks: int) -> None:
    if max(subspace.bases) >= n_blocks:
        raise InputError(
            f"the subspace has layer {max(subspace.bases)}, but the model has blocks 0 to {n_blocks - 1};\n"
            "give one that was found in this model"
        )


def _check_lora(model: PeftModel, adapter_name: str) -> None:
    """Refuse adapters that are missing, not plain LoRA, or that change the base model's first forward pass."""
    if adapter_name not in model.peft_config:
        raise InputError(f"there is no adapter {adapter_name!r}; the model has {', '.join(model.peft_config)}")
    config = model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise InputError(
            f"adapter {adapter_name!r} is {config.peft_type}, but only LoRA can be initialized; give one that is"
        )
    if config.init_lora_weights is not True:
        raise InputError(
            f"init_lora_weights is {config.init_lora_weights!r}, but must be left at True:\n"
            "other initializations are overwritten here, and some change the base weights"
        )
    unsupported = {
        "bias": config.bias != "none",  # trains the base model's, so that adapters off is no longer the base
        "lora_bias": config.lora_bias,
        "layer_replication": config.layer_replication is not None,  # blocks would no longer be the SAEs' layers
    }
    variants = {
        type(module.lora_variant[adapter_name]).__name__  # DoRA, QALoRA, aLoRA, ...: another forward pass
        for module in model.modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_variant
    }
    refused = sorted(name for name, used in unsupported.items() if used) + sorted(variants)
    if refused:
        raise InputError(f"only plain LoRA (rsLoRA included) can be initialized; leave out {', '.join(refused)}")


def _check_zero(targets: list[Target], adapter_name: str) -> None:
    """Refuse an adapter that changes the model already."""
    for target in targets:
        if all(factor.any() for factor in _factors(target.module, adapter_name)):
            raise InputError(
                f"the adapter {adapter_name!r} is not zero ({target.name}): it was trained, or initialized by another "
                "method;\nmake a fresh one with peft.get_peft_model, and leave init_lora_weights at True"
            )


def _plan(target: Target, subspace: Subspace, layer_map: LayerMap, adapter_name: str) -> ModuleInit:
    """Plan the initialization of one module."""
    side = SIDES[target.path]
    width = target.module.in_features if side == "A" else target.module.out_features
    if width != subspace.d_model:
        raise InputError(
            f"the subspace has d_model {subspace.d_model}, but {target.name} has {width};\n"
            "give one that was found in this model"
        )
    rank = target.module.r[adapter_name]
    if rank > width:
        raise InputError(f"{target.name} has rank {rank}, more than d_model {width}; lower r (lora_r)")
    layer = source_layer(target.block, target.path, subspace.bases, layer_map, subspace.onset)
    if layer is None:
        why = "no SAE" if layer_map == "sae_only" else f"is before the onset, layer {subspace.onset}"
        raise InputError(
            f"layer_map is {layer_map}, but {target.name} has an adapter and {why} "
            f"(SAE layers: {', '.join(map(str, subspace.bases))});\n"
            "give LoraConfig the target_modules that `target_modules_for` returns"
        )
    return ModuleInit(target.name, side, layer, rank, min(rank, _basis(subspace, side, layer).shape[1]))


def _basis(subspace: Subspace, side: Side, layer: int) -> torch.Tensor:
    """Return the basis (D, R) that a side takes from a layer."""
    return (subspace.bases if side == "A" or subspace.writers is None else subspace.writers)[layer]


def _seed(seed: int, target: Target) -> int:
    """Return a seed for one module that depends neither on the process nor on which other modules have adapters."""
    digest = hashlib.sha256(f"{seed}/{target.block}/{target.path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _factors(module: LoraLayer, adapter_name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """Return lora_A (R, in) and lora_B (out, R)."""
    return tuple(part.get_parameter(f"{adapter_name}.weight") for part in (module.lora_A, module.lora_B))  # pyright: ignore[reportReturnType]


def _write(module: LoraLayer, side: Side, adapter_name: str, directions_DR: torch.Tensor) -> torch.Tensor:
    """Copy the directions into one factor and zero the other. Return the new value of that factor, in float32."""
    lora_A, lora_B = _factors(module, adapter_name)
    kept, zeroed = (lora_A, lora_B) if side == "A" else (lora_B, lora_A)
    kept.copy_(directions_DR.T if side == "A" else directions_DR)
    zeroed.zero_()
    # A partitioned or shared parameter would take the values and keep others.
    assert not zeroed.any(), "one factor is zero"
    assert torch.isfinite(kept).all(), "the other factor is finite"
    assert kept.any(dim=1 if side == "A" else 0).all(), "and has no zero direction"
    return kept.detach().float().clone()


def freeze_factors(targets: Sequence[Target], freeze: bool | Literal["readers"], adapter_name: str) -> None:
    """Freeze the factors that take the directions, as `initialize` does."""
    for target in targets:
        side = SIDES[target.path]
        if freeze and (freeze != "readers" or side == "A"):  # also True of NumPy, and 1
            freeze_sides(target.module, (side,), adapter_name)


def freeze_sides(module: LoraLayer, sides: Sequence[Side], adapter_name: str = "default") -> None:
    """Freeze factors of an adapter with the mechanism of PEFT's MiCA.

    `requires_grad_(False)` alone is undone by `disable_adapter()` and `set_adapter()`, both of which run in DPO's
    reference pass. The dict is replaced, not changed: PEFT's default is shared by the class.
    """
    module.frozen_peft_weight_names = {
        **module.frozen_peft_weight_names,
        adapter_name: tuple(f"lora_{side}" for side in sides),
    }
    module._freeze_non_trainable_peft_weights(adapter_name)
