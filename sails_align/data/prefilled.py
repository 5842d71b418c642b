"""Tokenize examples of which not just the response is learned, and give each token its label.

Transforms mark such examples by two columns:

prefill       text that the response begins with; it is read and not learned. Empty: the response has no such beginning.
transition    None: the response `chosen` follows the prefill, and is learned. Else a text, whose first token is the
              label of every token of the prefill and of the one that ends it; nothing follows.

TRL's SFTTrainer takes the columns `input_ids` and `labels` as they are. A row without a prefill gets the tokens and
labels that TRL would make of it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.data.loading import cache_errors
from sails_align.data.messages import Message, assistant
from sails_align.data.tokens import as_text, control_tokens, render, render_with_span

PREFILL, TRANSITION = "prefill", "transition"
IGNORED = -100
"""The label of a token that is not learned."""
CUT_OFF = "the refusal after the first words of a harmful answer is cut off by max_length"
"""Why `without_cut` leaves out rows."""


def is_prefilled(rows: Dataset) -> bool:
    """Return whether rows have the two columns."""
    return PREFILL in rows.column_names


def response_of(row: Mapping[str, Any]) -> str:
    """Return the whole response of an example, learned or not."""
    if not row.get(PREFILL):
        return row["chosen"]
    return row[PREFILL] if row.get(TRANSITION) is not None else f"{row[PREFILL]} {row['chosen']}"


def to_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Tokenize normalized rows; the result has the columns `input_ids` and `labels`, and no others."""

    def tokenized(row: dict[str, Any]) -> dict[str, list[int]]:
        return dict(zip(("input_ids", "labels"), tokens_and_labels(tokenizer, row), strict=True))

    features = Features({name: List(Value("int64")) for name in ("input_ids", "labels")})
    with cache_errors():
        return rows.map(tokenized, remove_columns=rows.column_names, features=features, desc="Tokenizing rows")


def tokens_and_labels(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return the token ids of an example, and the label of each.

    Raises `InputError` if the chat template fails or rewrites the response, or the tokenizer has no offsets.
    """
    prompt, prefill, transition = row["prompt"], row.get(PREFILL) or "", row.get(TRANSITION)
    if not prefill:
        ids = _ids(tokenizer, render(tokenizer, [*prompt, assistant(row["chosen"])], add_generation_prompt=False))
        before = _ids(tokenizer, render(tokenizer, prompt, add_generation_prompt=True))
        n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, before, strict=False)))  # as TRL does
        return ids, [IGNORED] * n + ids[n:]
    ids, ends, start = _response_tokens(tokenizer, prompt, response_of(row))
    first = _place(ends, start)
    (written,) = as_text([assistant(prefill)], control_tokens(tokenizer))  # as `render` writes it
    end = start + len(written["content"])
    if transition is None:
        n = _place(ends, end + 1)  # after the space
        return ids, [IGNORED] * n + ids[n:]
    label, n = first_token(tokenizer, prompt, transition), min(_place(ends, end) + 1, len(ids))
    return ids, [IGNORED] * first + [label] * (n - first) + [IGNORED] * (len(ids) - n)


def first_token(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], response: str) -> int:
    """Return the first token of a response to a prompt: the one after the last token of the template."""
    ids, ends, start = _response_tokens(tokenizer, prompt, response)
    return ids[_place(ends, start)]


def check_transitions(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that all transitions have one first token, and that some refusal begins with it.

    Raises `InputError` if they do not.
    """
    marked = [row for row in _rows(rows) if row.get(TRANSITION) is not None]
    labels = Counter(first_token(tokenizer, row["prompt"], row[TRANSITION]) for row in marked)
    if len(labels) > 1:
        counts = ", ".join(f"{tokenizer.decode([label])!r} {n}" for label, n in labels.most_common(4))
        raise InputError(
            f"derta_rto_share is given, but the refusals begin with {len(labels)} different tokens ({counts}"
            f"{', ...' * (len(labels) > 4)});\nsay how refusals are to begin, with --derta_refusal"
        )
    if labels and not any(first_token(tokenizer, row["prompt"], row["chosen"]) in labels for row in marked):
        name = marked[0][TRANSITION]
        raise InputError(f"derta_refusal is {name!r}, but no refusal begins like that; give the beginning of one")


def without_cut(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """Leave out the rows whose response is learned after a prefill, and not all of it fits `max_length` tokens."""
    if max_length is None:
        return rows
    kept = []
    for index, row in enumerate(_rows(rows)):
        learned_after = row.get(PREFILL) and row.get(TRANSITION) is None
        if not learned_after or len(tokens_and_labels(tokenizer, row)[0]) <= max_length:
            kept.append(index)
    return rows if len(kept) == len(rows) else rows.select(kept)


def _rows(rows: Dataset) -> Iterator[dict[str, Any]]:
    return iter(rows)  # pyright: ignore[reportReturnType] -- the type of a dataset's rows is not known to it


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]


def _response_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], response: str
) -> tuple[list[int], list[int], int]:
    """Return a conversation's token ids, the character after each token, and that where the response begins."""
    if not tokenizer.is_fast:
        raise InputError(f"{tokenizer.name_or_path} has a tokenizer without character offsets; use its fast tokenizer")
    text, start, _ = render_with_span(tokenizer, [*prompt, assistant(response)], False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoding["input_ids"], [end for _, end in encoding["offset_mapping"]], start  # pyright: ignore[reportReturnType, reportGeneralTypeIssues]


def _place(ends: list[int], character: int) -> int:
    """Return the first token that holds a character or one after it."""
    return next((place for place, end in enumerate(ends) if end > character), len(ends))
