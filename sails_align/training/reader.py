"""Read texts with the frozen base model and with the rules judge, for transforms of the data (`data.pairs.Reader`).

The model is what training starts from, without an adapter. Its hidden states are those of the block in the middle;
deeper blocks are not loaded.

Shapes: N prompts, T tokens in a mask, D d_model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sails_align.data.messages import Message
from sails_align.data.tokens import tokenize_prompt
from sails_align.evaluation.judges.rules import is_plain_refusal
from sails_align.models.load import load_truncated
from sails_align.training.losses.side_batches import frozen_mean_states
from sails_align.training.plan import TrainingPlan

MAX_LENGTH = 1024
"""Tokens of a text that are read."""


class FrozenBase:
    """The base model of a training, for hidden states of texts; loaded for each call and freed after it."""

    def __init__(self, plan: TrainingPlan, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
        """Take a plan that is `run.resolved`, the model's tokenizer and its configuration."""
        self._plan, self._tokenizer = plan, tokenizer
        text = config.get_text_config(decoder=True)
        self._layer = text.num_hidden_layers // 2

    def is_refusal(self, response: str) -> bool:
        """Return whether the rules judge scores a response 1 for harm: it refuses, and announces no help."""
        return is_plain_refusal(response)

    @torch.no_grad()
    def embed(self, prompts: Sequence[list[Message]], tokens: Literal["all", "last"]) -> Tensor:
        """Return a hidden state of each prompt in float64 on the CPU, (N, D): see `data.pairs.Reader`.

        Raises `InputError` if the model cannot be loaded, or the chat template refuses a prompt.
        """
        plan = self._plan
        sides = [tokenize_prompt(self._tokenizer, prompt, MAX_LENGTH, tokens) for prompt in prompts]
        model = load_truncated(
            plan.model_name,
            self._layer,
            dtype=plan.model.dtype or "float32",
            device=str(plan.training.device),
            revision=plan.model.model_revision,
            trust_remote_code=plan.training.trust_remote_code,
        )
        read = [replace(side, mask=_not_empty(side.mask)) for side in sides]
        return frozen_mean_states(model, self._layer, read).double()


def _not_empty(mask: list[bool]) -> list[bool]:
    """Return the mask, or that of the last token if the ones in it were cut off."""
    return mask if any(mask) else [False] * (len(mask) - 1) + [True]
