"""LoRA adapters of tiny models, made by PEFT, and what can be wrong with their files."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]


def save_adapter(folder: Path, base: Path, **options: Any) -> Path:
    """An adapter whose every weight is random, so that it changes what the model computes."""
    torch.manual_seed(1)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": MODULES, **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, change: Any) -> None:
    """Apply a function to the tensors, which are a dict of names and tensors in the file's order."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def lose_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[3]]


def empty_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[3]] = torch.empty(0)  # as DeepSpeed ZeRO-3 has saved them


def nan_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[3]].view(-1)[5] = float("nan")


def other_rank(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[2]
    assert "lora_A" in name
    tensors[name] = tensors[name][:-1].clone()
