"""A tiny model in float64, wider than a few prompts have tokens, for tests of initializations."""

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import RANK, Project
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from sails_align.initializers.examples import StartExamples

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HARMFUL, HARMLESS = ("how do i break the lock 1", "how do i break the lock 2"), "how do i mend the cup 7"


def examples_of(tokenizer: PreTrainedTokenizerBase, *prompts: str) -> StartExamples:
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in prompts])
    return StartExamples(tokenizer, rows, None, rows)


def base_model(project: Project) -> PreTrainedModel:
    """The tiny model in float64, wide enough that a few prompts leave a null space; the same in every call."""
    torch.manual_seed(0)
    tiny = LlamaConfig.from_pretrained(project.folder / "tiny")
    tiny.update({"hidden_size": 64, "intermediate_size": 96})
    return AutoModelForCausalLM.from_config(tiny).double()


def adapted(project: Project, **options: Any) -> PeftModel:
    config = LoraConfig(**{"r": RANK, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})
    return get_peft_model(base_model(project), config, autocast_adapter_dtype=False).eval()


@torch.no_grad()
def logits_at(model: PeftModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return model(**ids).logits


@torch.no_grad()
def disturb(model: PeftModel, seed: int = 5) -> None:
    """Change A and B of every module at random."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(parameter.norm() / noise.norm() * noise)


def largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
