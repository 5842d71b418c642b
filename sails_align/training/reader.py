"""Read texts with the frozen base model and with the rules judge, for transforms of the data (`data.pairs.Reader`).

The model is what training starts from, without an adapter. Its hidden states are those of the block in the middle;
deeper blocks are not loaded.

Shapes: N prompts, T tokens in a mask, D d_model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sails_align.data.messages import Message
from sails_align.data.tokens import TokenizedSide, batches_by_length, padded, tokenize_prompt
from sails_align.evaluation.judges.rules import read_refusal
from sails_align.models.hooks import evaluation_mode, hidden_states_at
from sails_align.models.load import load_truncated
from sails_align.training.plan import TrainingPlan

MAX_LENGTH, MAX_TOKENS = 1024, 4096
"""Tokens of a text that are read, and of a batch with its padding."""


@dataclass(frozen=True)
class _Numbered(TokenizedSide):
    number: int


class FrozenBase:
    """The base model of a training, for hidden states of texts; loaded for each call and freed after it."""

    def __init__(self, plan: TrainingPlan, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
        """Take a plan that is `run.resolved`, the model's tokenizer and its configuration."""
        self._plan, self._tokenizer = plan, tokenizer
        text = config.get_text_config(decoder=True)
        self._layer, self._d_model = text.num_hidden_layers // 2, text.hidden_size

    def is_refusal(self, response: str) -> bool:
        """Return whether the rules judge scores a response 1 for harm: it refuses, and announces no help."""
        return read_refusal(response).outcome == "refusal"

    @torch.no_grad()
    def embed(self, prompts: Sequence[list[Message]], tokens: Literal["all", "last"]) -> Tensor:
        """Return a hidden state of each prompt in float64 on the CPU, (N, D): see `data.pairs.Reader`.

        Raises `InputError` if the model cannot be loaded, or the chat template refuses a prompt.
        """
        plan = self._plan
        sides = [tokenize_prompt(self._tokenizer, prompt, MAX_LENGTH, tokens) for prompt in prompts]
        numbered = [_Numbered(side.input_ids, _not_empty(side.mask), number) for number, side in enumerate(sides)]
        model = load_truncated(
            plan.model_name,
            self._layer,
            dtype=plan.model.dtype or "float32",
            device=str(plan.training.device),
            revision=plan.model.model_revision,
            trust_remote_code=plan.training.trust_remote_code,
        )
        found_ND = torch.zeros(len(prompts), self._d_model, dtype=torch.float64)
        with evaluation_mode(model):
            for batch in batches_by_length(numbered, MAX_TOKENS):
                ids_BS, attention_BS, mask_BS = padded(batch)
                hidden_BSD = hidden_states_at(model, [self._layer], ids_BS, attention_BS)[self._layer].double().cpu()
                for side, hidden_SD, mask_S in zip(batch, hidden_BSD, mask_BS, strict=True):
                    found_ND[side.number] = hidden_SD[mask_S].mean(0)
        return found_ND


def _not_empty(mask: list[bool]) -> list[bool]:
    """Return the mask, or that of the last token if the ones in it were cut off."""
    return mask if any(mask) else [False] * (len(mask) - 1) + [True]
