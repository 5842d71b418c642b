"""Convert suffixes between text and tokens, and find those that a search over tokens may try.

A search replaces tokens, but an attacker sends text, which is often tokenized into other tokens. So a suffix counts
only if its tokens are the same again after conversion to text and the chat template.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.data.tokens import MARK, render, special_token_ids
from sails_align.evaluation.attacks.wrappers import with_suffix
from sails_align.evaluation.records import Prompt


@dataclass(frozen=True)
class Frame:
    """The text and tokens around a suffix: prompt, chat template and target."""

    before: str
    """The rendered conversation up to the space before the suffix."""
    after: str
    """The rest of the conversation, with the generation prompt."""
    before_ids: list[int]
    after_ids: list[int]
    target_ids: list[int]
    """How the wanted answer begins."""

    def text(self, suffix: str) -> str:
        """Return the conversation with a suffix."""
        return f"{self.before} {suffix}{self.after}"

    def ids(self, suffix_ids: Sequence[int]) -> list[int]:
        """Return the token ids of the conversation with a suffix."""
        return [*self.before_ids, *suffix_ids, *self.after_ids]


def make_frame(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, suffix: str, target: str) -> tuple[Frame, list[int]]:
    """Make a prompt's frame, and return it with the tokens of a suffix in it.

    Tokens that also hold a part of the prompt belong to the frame. The target is tokenized alone, like an answer after
    a generation prompt that ends in special tokens or white space. Raises `InputError` if the tokenizer has no
    character offsets or no chat template, the template rewrites the prompt, or the target is empty.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{tokenizer.name_or_path} has a tokenizer without character offsets; use its fast tokenizer")
    before, after = texts_around(tokenizer, prompt)
    text = f"{before} {suffix}{after}"
    start, end = len(before), len(before) + 1 + len(suffix)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoding["input_ids"]
    inside = [index for index, (first, last) in enumerate(encoding["offset_mapping"]) if start <= first < last <= end]
    target_ids: list[int] = tokenizer(target, add_special_tokens=False)["input_ids"]
    if not target_ids:
        raise InputError(f"the target of prompt {prompt.id!r} is empty; say how the wanted answer begins")
    if not inside:
        raise InputError(f"the suffix {suffix!r} has no tokens of its own; give another one with --initial_suffix")
    first, last = inside[0], inside[-1] + 1
    return Frame(before, after, ids[:first], ids[last:], target_ids), ids[first:last]


def texts_around(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[str, str]:
    """Return what comes before and after a suffix; raise `InputError` if the chat template cannot write the prompt."""
    try:
        text = render(tokenizer, with_suffix(prompt, MARK).messages, add_generation_prompt=True)
    except InputError as error:
        raise InputError(f"the prompt {prompt.messages[-1]['content'][:60]!r}: {error}") from error
    before, mark, after = text.partition(f" {MARK}")
    if not mark or MARK in after:
        raise InputError(f"the chat template of {tokenizer.name_or_path} rewrites prompt {prompt.id!r}; leave it out")
    return before, after


def allowed_tokens(tokenizer: PreTrainedTokenizerBase, n_embeddings: int) -> list[int]:
    """Return the ids of tokens for suffixes: printable ASCII, not blank, not special, and with an embedding."""
    special = special_token_ids(tokenizer)
    ids = [token_id for token_id in range(min(len(tokenizer), n_embeddings)) if token_id not in special]
    texts = tokenizer.batch_decode([[token_id] for token_id in ids], clean_up_tokenization_spaces=False)
    return [
        token_id
        for token_id, text in zip(ids, texts, strict=True)
        if text.isascii() and text.isprintable() and text.strip()
    ]


def surviving(
    tokenizer: PreTrainedTokenizerBase, frames: Sequence[Frame], candidates: Sequence[Sequence[int]]
) -> list[tuple[list[int], str]]:
    """Return the candidates that are the same tokens again after conversion to text, in all frames; with their texts.

    Candidates with special tokens are left out.
    """
    special = special_token_ids(tokenizer)
    candidates = [ids for ids in candidates if special.isdisjoint(ids)]
    if not candidates:  # of which the tokenizer would make one text
        return []
    texts = tokenizer.batch_decode([list(ids) for ids in candidates], clean_up_tokenization_spaces=False)
    # Some decoders keep the space before the first word, some drop it. Templates trim white space at the end.
    kept = [(list(ids), text.removeprefix(" ")) for ids, text in zip(candidates, texts, strict=True)]
    kept = [(ids, text) for ids, text in kept if text and text == text.strip()]
    for frame in frames:
        if not kept:
            break
        whole = [frame.text(text) for _, text in kept]
        encoded = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        kept = [pair for pair, ids in zip(kept, encoded, strict=True) if ids == frame.ids(pair[0])]
    return kept
