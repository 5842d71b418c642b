"""Give initializations examples to run through the model: of the task, and of harmful prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sails_align.data.prefilled import response_of
from sails_align.data.tokens import TokenizedSide, tokenize_prompt, tokenize_response

N_EXAMPLES = 512
"""Of each kind, at most: the first ones, so that every process takes the same."""


@dataclass(frozen=True)
class StartExamples:
    """Rows that an initialization may look at. Each has a `prompt` (messages); the first two a `chosen` response."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    """What is trained on."""
    task: Dataset | None
    """Examples of the task alone: without harmful requests, as far as these are known."""
    harmful: Dataset
    max_length: int = 1024

    def responses(self, rows: Dataset) -> list[TokenizedSide]:
        """Return conversations; their masks hold the responses."""
        return [
            tokenize_response(self.tokenizer, row["prompt"], response_of(row), self.max_length)
            for row in self._first(rows)
        ]

    def prompts(self, tokens: Literal["last", "all"]) -> list[TokenizedSide]:
        """Return the harmful prompts, ready to be answered; their masks hold the last token or all, the template's too.

        A prompt that is longer than `max_length` loses its last token, and is left out where only that one counts.
        """
        rows = self._first(self.harmful)
        sides = [tokenize_prompt(self.tokenizer, row["prompt"], self.max_length, tokens="last") for row in rows]
        return sides if tokens == "last" else [whole(side) for side in sides]

    def _first(self, rows: Dataset) -> Sequence[Any]:
        return rows.select(range(min(N_EXAMPLES, len(rows))))  # pyright: ignore[reportReturnType] -- of rows


def whole(side: TokenizedSide) -> TokenizedSide:
    """Return a sequence with all of its tokens in the mask."""
    return TokenizedSide(side.input_ids, [True] * len(side.input_ids))
