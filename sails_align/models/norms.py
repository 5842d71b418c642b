"""The gain of the RMSNorm that stands between the residual stream and a module.

An RMSNorm returns `gain * x / rms(x)`. A reader behind it with the row `a` reads the direction `gain * a` of the
residual stream; a writer before it with the column `b` writes the direction `gain * b` to it.

Shape: D d_model.
"""

import torch
from peft.utils.integrations import gather_params_ctx
from torch import nn

from sails_align.core.errors import InputError

GAIN_FLOOR = 0.01
"""Gains smaller than this share of the mean absolute gain are taken as this share (with their sign): a coordinate that
the norm all but removes would otherwise swamp the direction once it is divided by its gain."""

_PRE_NORM = {  # Llama, Qwen 2 and 3, Mistral, Gemma 1: writers add to the residual stream directly
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
_SANDWICH_NORM = {  # Gemma 2 and 3: a norm before and after attention, and before and after the MLP
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "post_attention_layernorm",
    "mlp.gate_proj": "pre_feedforward_layernorm",
    "mlp.up_proj": "pre_feedforward_layernorm",
    "mlp.down_proj": "post_feedforward_layernorm",
}
_LAYOUTS = {
    frozenset(_PRE_NORM.values()): _PRE_NORM,
    frozenset(_SANDWICH_NORM.values()): _SANDWICH_NORM,
}


def norm_gain(block: nn.Module, path: str, *, floored: bool = True) -> torch.Tensor | None:
    """Return the gain (D,) of the norm at a block's module ("self_attn.q_proj"), float32 on the CPU, if it has one.

    With `floored`, as `floored_gain` gives it, to divide by; else as it is, to multiply with. Raises `InputError` if
    the block's norms are arranged in a way that is not known, or one is not an RMSNorm.
    """
    names = _norms_of(block)
    if names not in _LAYOUTS:
        raise InputError(
            f"fold_norm does not know {type(block).__name__}, whose norms are {', '.join(sorted(names)) or 'none'};\n"
            "leave fold_norm out, or use a Gemma, Llama, Qwen or Mistral model"
        )
    name = _LAYOUTS[names].get(path)
    if name is None:
        return None
    gain_D = _measured_gain(block.get_submodule(name))
    return floored_gain(gain_D) if floored else gain_D


def has_known_norms(block: nn.Module) -> bool:
    """Return whether a block's norms are arranged in a way that `norm_gain` knows."""
    return _norms_of(block) in _LAYOUTS


def _norms_of(block: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in block.named_children() if name.endswith("norm"))


def _measured_gain(norm: nn.Module) -> torch.Tensor:
    """Measure what an RMSNorm multiplies each coordinate by: Gemma's is 1 + weight and others' is weight."""
    with gather_params_ctx(list(norm.parameters()), modifier_rank=None), torch.no_grad():  # ZeRO-3 splits the weight
        weight = next(norm.parameters())
        gain_D = norm(torch.ones(1, weight.numel(), dtype=torch.float32, device=weight.device))[0].float().cpu()
    if not (torch.isfinite(gain_D).all() and gain_D.any()):
        raise InputError(
            f"fold_norm needs an RMSNorm, and {type(norm).__name__} is none (or its weights are damaged);\n"
            "leave fold_norm out"
        )
    return gain_D


def floored_gain(gain_D: torch.Tensor) -> torch.Tensor:
    """Move entries near zero away from it: to the share `GAIN_FLOOR` of the mean absolute gain."""
    magnitude_D = gain_D.abs()
    return torch.where(gain_D < 0, -1.0, 1.0) * magnitude_D.clamp(min=GAIN_FLOOR * magnitude_D.mean().item())
