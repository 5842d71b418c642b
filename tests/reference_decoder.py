"""The decoders of Gemma 2, Gemma 3 and Llama written out, from `config.json` and the checkpoint's tensors alone.

Nothing of transformers' models is used. One sequence without padding, in float64.

Shapes: S sequence, D d_model, H heads, K key-value heads, W width of a head.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

SLIDING_THETA = 10_000.0
"""Gemma 3's base of rotary embeddings in blocks with a sliding window."""


def residual_stream(config: Mapping[str, Any], tensors: Mapping[str, Tensor], ids_S: Tensor) -> list[Tensor]:
    """The residual stream (S, D): the embeddings, and then after each block.

    Args:
        config: config.json of a language model, or `text_config` of a multimodal one.
        tensors: of the decoder, by their names after the last "model.".
        ids_S: token ids.
    """
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    is_gemma = config["model_type"].startswith("gemma")
    x_SD = weights["embed_tokens.weight"][ids_S]
    if is_gemma:
        x_SD = x_SD * math.sqrt(config["hidden_size"])
    stream = [x_SD]
    for block in range(config["num_hidden_layers"]):
        of_block = {
            name.removeprefix(f"layers.{block}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"layers.{block}.")
        }
        x_SD = (_gemma_block if is_gemma else _llama_block)(config, of_block, x_SD, block)
        stream.append(x_SD)
    return stream


def _gemma_block(config: Mapping[str, Any], weights: Mapping[str, Tensor], x_SD: Tensor, block: int) -> Tensor:
    def norm(name: str, y_SD: Tensor) -> Tensor:
        return rms_norm(y_SD, 1 + weights[f"{name}.weight"])

    attended_SD = _attention(config, weights, norm("input_layernorm", x_SD), block)
    x_SD = x_SD + norm("post_attention_layernorm", attended_SD)
    y_SD = norm("pre_feedforward_layernorm", x_SD)
    gated = gelu(y_SD @ weights["mlp.gate_proj.weight"].T, approximate="tanh") * (
        y_SD @ weights["mlp.up_proj.weight"].T
    )
    return x_SD + norm("post_feedforward_layernorm", gated @ weights["mlp.down_proj.weight"].T)


def _llama_block(config: Mapping[str, Any], weights: Mapping[str, Tensor], x_SD: Tensor, block: int) -> Tensor:
    def norm(name: str, y_SD: Tensor) -> Tensor:
        return rms_norm(y_SD, weights[f"{name}.weight"], config["rms_norm_eps"])

    x_SD = x_SD + _attention(config, weights, norm("input_layernorm", x_SD), block)
    y_SD = norm("post_attention_layernorm", x_SD)
    gated = silu(y_SD @ weights["mlp.gate_proj.weight"].T) * (y_SD @ weights["mlp.up_proj.weight"].T)
    return x_SD + gated @ weights["mlp.down_proj.weight"].T


def rms_norm(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _attention(config: Mapping[str, Any], weights: Mapping[str, Tensor], x_SD: Tensor, block: int) -> Tensor:
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    length = len(x_SD)
    q_SHW, k_SKW, v_SKW = (
        (x_SD @ weights[f"self_attn.{name}_proj.weight"].T).view(length, -1, width) for name in ("q", "k", "v")
    )
    if "self_attn.q_norm.weight" in weights:  # Gemma 3
        q_SHW = rms_norm(q_SHW, 1 + weights["self_attn.q_norm.weight"])
        k_SKW = rms_norm(k_SKW, 1 + weights["self_attn.k_norm.weight"])
    slides = _slides(config["model_type"], block)
    angles_SW = torch.arange(length)[:, None] * _frequencies(config, width, slides)[None]
    q_SHW, k_SKW = _rotate(q_SHW, angles_SW), _rotate(k_SKW, angles_SW)
    groups = q_SHW.shape[1] // k_SKW.shape[1]
    k_SHW, v_SHW = k_SKW.repeat_interleave(groups, 1), v_SKW.repeat_interleave(groups, 1)
    scale = config.get("query_pre_attn_scalar", 256 if config["model_type"].startswith("gemma") else width) ** -0.5
    scores_HSS = torch.einsum("shw,thw->hst", q_SHW, k_SHW) * scale
    if (cap := config.get("attn_logit_softcapping")) is not None:
        scores_HSS = cap * torch.tanh(scores_HSS / cap)
    distance_SS = torch.arange(length)[:, None] - torch.arange(length)[None]
    hidden_SS = (distance_SS < 0) | (slides & (distance_SS >= config.get("sliding_window", length)))
    attention_HSS = scores_HSS.masked_fill(hidden_SS, -math.inf).softmax(-1)
    mixed_SD = torch.einsum("hst,thw->shw", attention_HSS, v_SHW).reshape(length, -1)
    return mixed_SD @ weights["self_attn.o_proj.weight"].T


def _slides(model_type: str, block: int) -> bool:
    """Every other block of Gemma 2 has a sliding window, and five of six of Gemma 3."""
    return {"gemma2": block % 2 == 0, "gemma3_text": (block + 1) % 6 != 0}.get(model_type, False)


def _frequencies(config: Mapping[str, Any], width: int, slides: bool) -> Tensor:
    """Of rotary embeddings (W/2,)."""
    is_gemma3 = config["model_type"] == "gemma3_text"
    theta = config.get("rope_theta", 1_000_000.0)
    theta = SLIDING_THETA if is_gemma3 and slides else theta
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    scaling = config.get("rope_scaling")
    if scaling is None or (is_gemma3 and slides):
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    turns = (
        scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    )  # Llama 3's, within the old context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return share * frequencies + (1 - share) * frequencies / scaling["factor"]


def _rotate(x_SHW: Tensor, angles: Tensor) -> Tensor:
    """The first half of a head's coordinates with the second."""
    first, second = x_SHW.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
