"""Models of one family: a base, the aligned model, and what was trained from it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapters import save_adapter
from safetensors.torch import load_file
from tiny import SENTENCES, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, GptOssForCausalLM

from sails_align import edits


@dataclass(frozen=True)
class Family:
    """Folders of a tiny model's relatives."""

    base: Path
    aligned: Path
    unaligned: Path
    tuned: Path
    """Trained from the aligned model."""
    adapter: Path
    """On the base."""
    tuned_adapter: Path
    """On the aligned model."""


def save_family(folder: Path) -> Family:
    """Save relatives that differ by random changes of rank 3 and of every vector."""
    save_model(folder / "base")
    aligned = _changed(folder / "base", folder / "aligned", seed=1)
    return Family(
        folder / "base",
        aligned,
        _changed(aligned, folder / "unaligned", seed=2),
        _changed(aligned, folder / "tuned", seed=3),
        save_adapter(folder / "adapter", folder / "base"),
        save_adapter(folder / "tuned_adapter", aligned),
    )


def _changed(source: Path, folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for parameter in model.parameters():
            left, right = (torch.randn(size, 3, generator=generator) for size in (len(parameter), parameter[0].numel()))
            parameter += 0.02 * (left @ right.T).view_as(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def save_experts(folder: Path, tokenizer: Path) -> tuple[Path, Path]:
    """Save a model of one block whose experts are stacks of matrices, and a random change of all of its tensors."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    words = AutoTokenizer.from_pretrained(tokenizer)
    GptOssForCausalLM(GptOssConfig(vocab_size=len(words), **shape, **heads, **experts)).save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    return folder / "base", _changed(folder / "base", folder / "tuned", seed=1)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a model's or an adapter's folder."""
    name = "model.safetensors" if (folder / "model.safetensors").is_file() else "adapter_model.safetensors"
    return load_file(folder / name)


def run(name: str, folder: Path, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Run an edit, and return the weights it wrote."""
    given = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    edits.run(name, folder, output, **given)
    return tensors(output)


def updates(folder: Path, scaling: float = 2.0) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight, in float64 (PEFT's default: alpha 8, so 8 / r of 4)."""
    found = {name: value.double() for name, value in tensors(folder).items()}
    modules = {name.rsplit(".lora_", 1)[0] for name in found}
    return {m: scaling * found[f"{m}.lora_B.weight"] @ found[f"{m}.lora_A.weight"] for m in modules}


def save_requests(folder: Path) -> dict[str, str]:
    """Harmful requests that are refused, and harmless ones that are answered, as the options that name them."""
    harmless, harmful, refusal, answer = SENTENCES
    folder.mkdir()
    named = {"dataset_name": (harmful, refusal), "helpful_dataset_name": (harmless, answer)}
    for name, (request, response) in named.items():
        rows = [{"prompt": f"{request} {i}", "response": f"{response} {i}"} for i in range(30)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in named}
