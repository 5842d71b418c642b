"""Run a model on a few random tokens, to see whether an edit of its weights did what it should.

Shapes: B batch, S sequence, V vocabulary.
"""

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from sails_align.core.errors import InputError, first_line
from sails_align.models.load import load_causal_lm

PROMPTS, PROMPT_LENGTH = 4, 16
"""Sequences of random tokens, and their length."""


def checked_device(device: str | None) -> str:
    """Return the device that is asked for (None: a GPU if there is one); raise `InputError` if it cannot be used."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if not torch.empty(0, device=device).is_meta:
            return device
        cause = "it holds no values"
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        cause = first_line(error)
    raise InputError(f"device is {device!r}, which cannot be used: {cause}; choose cpu, or cuda")


def random_ids(config: PreTrainedConfig) -> torch.Tensor:
    """Return token ids (B, S), the same in every run."""
    generator = torch.Generator().manual_seed(0)
    n_tokens = config.get_text_config(decoder=True).vocab_size
    return torch.randint(n_tokens, (PROMPTS, PROMPT_LENGTH), generator=generator)


def loaded(name: str, dtype: torch.dtype | str, device: str, revision: str | None = None) -> PreTrainedModel:
    """Load a model in evaluation mode, with exact attention; raise `InputError` if the device has too little memory."""
    model = load_causal_lm(name, dtype=dtype, revision=revision)
    try:
        return model.to(device).eval()  # pyright: ignore[reportArgumentType]
    except torch.OutOfMemoryError as error:
        raise InputError(f"{name} in {dtype} does not fit on {device}; use --device cpu") from error


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel, ids_BS: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, S, V) of a model, on the CPU and in float32."""
    return model(input_ids=ids_BS.to(model.device)).logits.float().cpu()
