"""What a model's generation_config.json decides: which tokens end a response, and nothing else.

transformers takes defaults of `generate` from that file, value by value (number of beams, penalties, suppressed tokens,
stop strings, ...), and vLLM those of sampling. Responses would then depend on a file that nobody named, and two
backends would differ.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sails_align.models.load import load_config

logger = logging.getLogger(__name__)

NO_CHOICE = ("eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "_from_model_config", "use_cache")
"""Fields that change no response beside its end."""


def context_length(config: PreTrainedConfig) -> int:
    """Return the maximum number of tokens of a prompt and its response together."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or sys.maxsize


def eos_ids(config: GenerationConfig | None) -> list[int]:
    """Return the tokens that end a response: Llama's file names several, most files one or none."""
    ids: Any = None if config is None else config.eos_token_id
    return [] if ids is None else list(dict.fromkeys(ids)) if isinstance(ids, list | tuple) else [ids]


def load_generation_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> GenerationConfig | None:
    """Load a model's generation_config.json, or what its config.json says; None if that says nothing."""
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        return GenerationConfig.from_pretrained(name, **where)
    except (OSError, ValueError, TypeError):  # there is none, or transformers does not understand it
        ids = getattr(load_config(name, **where).get_text_config(decoder=True), "eos_token_id", None)
        return None if ids is None else neutral_config(ids)


def neutral_config(ends: Sequence[int] | int, **more: Any) -> GenerationConfig:
    """Return a configuration that says which tokens end a response (and `more`), and leaves all else to the caller."""
    return GenerationConfig(eos_token_id=ends or None, **more)


def others_in(config: GenerationConfig | None) -> dict[str, Any]:
    """Return what a model's generation configuration would change beside the end of a response."""
    given = {} if config is None else config.to_diff_dict()
    usual = {**GenerationConfig._get_default_generation_params(), **dict.fromkeys(NO_CHOICE)}
    kept = {name: value for name, value in sorted(given.items()) if value not in (None, False, usual.get(name))}
    return {name: value for name, value in kept.items() if name not in NO_CHOICE and not name.startswith("output_")}


def end_generation(model: PreTrainedModel, ends: Sequence[int]) -> None:
    """Have the tokens that end a response saved with a model, in place.

    transformers refuses to save a configuration that contradicts itself, as Llama 2's did: after the training. Of such
    a one only the tokens are kept.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base.generation_config.eos_token_id = list(ends) or None
    if not is_savable(base.generation_config):
        logger.warning("the model's generation_config.json contradicts itself; only its EOS tokens are kept")
        base.generation_config = neutral_config(list(ends))


def is_savable(config: GenerationConfig) -> bool:
    """Return whether transformers saves a configuration."""
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


@contextmanager
def neutral_generation(model: PreTrainedModel, ends: Sequence[int], **more: Any) -> Iterator[None]:
    """Generate within the block as its caller says, whatever the model's generation configuration.

    Args:
        model: with or without an adapter; its configuration is restored.
        ends: the tokens that end a response.
        more: further fields.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    kept = base.generation_config
    holders = [base, *([model] if "generation_config" in vars(model) else [])]  # PEFT hands its own down, if it has one
    try:
        for holder in holders:
            holder.generation_config = neutral_config(list(ends), **more)
        yield
    finally:
        for holder in holders:
            holder.generation_config = kept


def say_what_is_left_out(
    config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]
) -> None:
    """Log which values of a model's generation_config.json are not used, and what ends a response."""
    if others := others_in(config):
        said = ", ".join(f"{name} {value}" for name, value in others.items())
        tokens = " or ".join(map(str, tokenizer.convert_ids_to_tokens(list(ends)))) or "no token"
        logger.warning(
            "%s: these values of generation_config.json are not used: %s; responses end with %s",
            tokenizer.name_or_path, said, tokens,
        )  # fmt: skip
