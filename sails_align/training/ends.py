"""Let training and generation agree on what ends a response.

A model learns to end with the token that the chat template writes after a response. If generation does not stop there,
it runs on into turns that it invents; and without such a token the model never learns to stop.
"""

import logging
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.data.tokens import turn_end
from sails_align.models.generation import eos_ids

logger = logging.getLogger(__name__)

WRITES_EOS = "{%- if not add_generation_prompt %}{{- eos_token }}{% endif %}"
"""Added to a template that writes no token after a response."""


@dataclass(frozen=True)
class ResponseEnd:
    """What ends a response, in training and in generation."""

    ids: tuple[int, ...]
    """All EOS tokens of the trained model, the tokenizer's first."""
    token: str
    """The tokenizer's EOS."""
    change: str | None = None
    """What had to be changed for it."""


def agree_on_end(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig | None) -> ResponseEnd:
    """Make generation stop at what the chat template writes after a response; changes the tokenizer in place.

    If that is none of the EOS tokens, it becomes the tokenizer's EOS. If the template writes no token, it is made to
    write the EOS after the last response.

    Args:
        tokenizer: with a chat template.
        config: the model's generation configuration.

    Raises:
        InputError: if the template writes no token and there is no EOS, or the template fails.
    """
    known, ends, change = eos_ids(config), turn_end(tokenizer), None
    if not ends:
        _write_eos(tokenizer)
        change = f"the chat template wrote no token after a response; it now writes {tokenizer.eos_token}"
    elif set(ends).isdisjoint([*known, tokenizer.eos_token_id]):
        before, tokenizer.eos_token = tokenizer.eos_token, _token(tokenizer, ends[0])
        change = f"responses end with {tokenizer.eos_token} in the chat template, and generation stopped at {before}"
        change += f" only; {tokenizer.eos_token} is now the EOS"
    if tokenizer.eos_token is None:  # one of generation_config.json's
        tokenizer.eos_token = _token(tokenizer, next(token for token in ends if token in known))
    eos: Any = tokenizer.eos_token_id
    ids: tuple[int, ...] = tuple(dict.fromkeys([eos, *known]))
    if set(ids).isdisjoint(turn_end(tokenizer)):
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} writes other tokens after a response than generation stops "
            "at;\ngive one with --chat_template_path FILE that writes {{ eos_token }} there"
        )
    if change is not None:
        logger.warning("%s: %s", tokenizer.name_or_path, change)
    return ResponseEnd(ids, str(tokenizer.eos_token), change)


def _token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token_id))


def _write_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token is None:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} writes no token after a response, and its tokenizer names "
            "no EOS: a model would\nnever learn to stop; give a template with --chat_template_path FILE that writes a "
            "special token there"
        )
    # Jinja drops one line break at a template's end, where it would otherwise stay before what is added.
    tokenizer.chat_template = str(tokenizer.chat_template).removesuffix("\n") + WRITES_EOS
