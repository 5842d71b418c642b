"""Support base models in 4 or 8 bits (QLoRA) by bitsandbytes: what adapters need in addition to TRL."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig
from trl import ModelConfig, get_quantization_config

OPTIONS = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
    "dtype",
)
"""TRL's, which decide how a base model is quantized."""


def quantization_of(options: Mapping[str, Any]) -> BitsAndBytesConfig | None:
    """Return how a run has quantized its base model, by the `ModelConfig` options in its `run.json`."""
    return get_quantization_config(ModelConfig(**{name: options[name] for name in OPTIONS if name in options}))


def quantization_of_run(record: Mapping[str, Any]) -> BitsAndBytesConfig | None:
    """Return how a run has quantized its base model, by its `run.json`; None if it did not, or there is no record."""
    return quantization_of(record.get("options", {}).get("model", {}))


def is_quantized(model: nn.Module) -> bool:
    """Return whether bitsandbytes holds a model's weights, also below an adapter."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return bool(getattr(inner, "is_loaded_in_4bit", False) or getattr(inner, "is_loaded_in_8bit", False))


def use_one_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from rearranging 4-bit weights in place, which it does on CPUs with AVX-512 BF16.

    It does so at the first forward pass in evaluation mode (`Linear4bit.forward`, as of 0.50), and rounds the weights'
    scales to bfloat16: the model of an evaluation, and DPO's reference, would then not be the one that is trained.
    Widths that 64 does not divide end in a RuntimeError there. On GPUs nothing is rearranged.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def trained_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained tensors by name; not copied."""
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_in_float32(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Train the adapter of a quantized model in float32, though TRL's trainers have rounded it to bfloat16.

    AdamW on bfloat16 numbers loses every change below 1/512 of a number: at a learning rate of 1e-5 those of all
    numbers above 0.005, and a subspace's directions have larger ones. `values` are those of `trained_values` before TRL
    had the model (an adapter that was trained already would be rounded, too); empty for an adapter that TRL has made.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = values.get(name, parameter.data).to(torch.float32)
