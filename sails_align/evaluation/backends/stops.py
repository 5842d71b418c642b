"""What ends a response: tokens, and texts where a chat template begins its turns with plain text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, StoppingCriteria

from sails_align.core.errors import InputError
from sails_align.core.text import cut_at
from sails_align.data.tokens import turn_end, turn_openers
from sails_align.models.generation import eos_ids

VERSION = 1
"""Of the rules here, in the identity of backends: another one makes other responses."""


@dataclass(frozen=True)
class Stops:
    """What ends a response, none of which is part of it."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()

    def cut(self, text: str) -> str:
        """Return a text up to the first of the texts that end a response."""
        return cut_at(text, self.texts)

    def held_back(self, text: str) -> int:
        """Return how many characters at the end of a text may be the beginning of one that ends the response."""
        lengths = (n for stop in self.texts for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)


def stops_of(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig | None) -> Stops:
    """Return what ends a model's responses.

    The tokens are the tokenizer's EOS and those of generation_config.json (Llama's <|eot_id|>, Gemma 3's
    <end_of_turn>). If the chat template ends a turn with none of these, its own token counts, too: Gemma 2's
    generation_config.json names only <eos>. The texts keep a model from writing the user's next turn, where nothing
    but text begins it: a base model was never trained to stop.

    Args:
        tokenizer: with or without a chat template.
        config: of the model.
    """
    own = [*eos_ids(config), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    texts: list[str] = []
    if tokenizer.chat_template is not None:
        try:
            ends, texts = turn_end(tokenizer), turn_openers(tokenizer)
        except InputError:  # a template that fails on these conversations may take the ones that are asked
            ends = []
        own += ends[:1] if set(own).isdisjoint(ends) else []
    return Stops(tuple(dict.fromkeys(own)), tuple(texts))


def openers_of_template(template: str) -> list[str]:
    """Return the texts that begin a turn (`turn_openers`) in a chat template, whatever the tokenizer.

    Raises `InputError` if the template fails.
    """
    empty = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="</s>"))
    return turn_openers(
        PreTrainedTokenizerFast(tokenizer_object=empty, bos_token="<s>", eos_token="</s>", chat_template=template)
    )


class StopTexts(StoppingCriteria):
    """Stop a row of a batch once its new text holds a text that ends the response."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], n_prompt: int) -> None:
        self._tokenizer, self._texts, self._n_prompt = tokenizer, texts, n_prompt
        self._n_tail = max(map(len, texts)) + 4  # a token has a character or more, but for parts of rare characters

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Return (B,), whether each row is done."""
        tails_BT = input_ids[:, self._n_prompt :][:, -self._n_tail :]
        tails = self._tokenizer.batch_decode(tails_BT, clean_up_tokenization_spaces=False)
        done = [any(stop in tail for stop in self._texts) for tail in tails]
        return torch.tensor(done, device=input_ids.device)
