"""Tokenize conversations with the model's chat template, and mask the tokens that discovery averages.

The span of a text in the rendered conversation is found by rendering it twice, once with a mark in the text's place:
what comes before and after the mark is the template's. So it does not matter whether a template trims the text, puts
an empty thinking block before it, or repeats it. Tokens are then assigned by their character offsets: a token that a
tokenizer merges over the border (as " Hi" after "Assistant:") belongs to the text it holds a part of.

Shapes: B batch, S sequence.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from sails_align.core.errors import InputError, first_line
from sails_align.core.templates import TEMPLATE_ERRORS
from sails_align.data.messages import BadRowError, Message, assistant, user

TEMPLATES = Path(__file__).parent / "templates"
"""Templates that come with the package, each known by its name: `human_assistant`."""
MARK = "\ue000text\ue000"  # private-use characters: not white space, so no template trims them, and in no real text

APART = "\u200b"
"""Zero-width space, put into special tokens that stand in texts."""
PROBE = [user("How are you?")]


@dataclass(frozen=True)
class TokenizedSide:
    """One sequence for feature discovery."""

    input_ids: list[int]
    mask: list[bool]
    """The tokens that are averaged; all False if truncation has left none of them."""


Side = TypeVar("Side", bound=TokenizedSide)


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of all special tokens: BOS, EOS, padding, and added ones such as `<start_of_turn>`."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*tokenizer.all_special_ids, *added])


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Return a pattern that finds the special tokens of two characters or more in a text; None if there are none."""
    return _pattern(tuple(map(str, tokenizer.convert_ids_to_tokens(sorted(special_token_ids(tokenizer))))))


@cache
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def as_text(messages: Iterable[Message], control: re.Pattern[str] | None) -> list[Message]:
    """Return messages whose contents hold no special tokens: an invisible character takes each apart.

    Else a tokenizer makes a control token of what is text: data that quotes `</s>` would teach a model to stop there,
    and a prompt could end its own turn.
    """
    if control is None:
        return list(messages)
    return [{**message, "content": control.sub(_apart, message["content"])} for message in messages]


def _apart(found: re.Match[str]) -> str:
    return f"{found[0][0]}{APART}{found[0][1:]}"


def content_token_mask(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int]) -> list[bool]:
    """Return a mask that is True for tokens that are not special."""
    special = special_token_ids(tokenizer)
    return [token_id not in special for token_id in input_ids]


def read_chat_template(path: str) -> str:
    """Read a chat template from a Jinja file, or one of the package by its name; raise `InputError` if it is none."""
    if path in (file.stem for file in TEMPLATES.glob("*.jinja")):
        path = str(TEMPLATES / f"{path}.jinja")
    if not path.endswith((".jinja", ".j2")):
        raise InputError(
            f"chat_template_path is {path}, but only a Jinja file can be used: taking another model's template"
            " would add tokens\nto the model; save that template to a file that ends in .jinja, or give human_assistant"
        )
    try:
        template = Path(path).read_text(encoding="utf-8-sig")  # a BOM would come before each BOS token
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise InputError(f"cannot read the chat template {path}: {cause}; check the path") from error
    if "messages" not in template:
        raise InputError(f"{path} is no chat template, since it has no `messages` in it; check the path")
    return template


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `InputError` if the chat template cannot write a question, and a question with its answer."""
    render(tokenizer, PROBE, add_generation_prompt=True)
    render(tokenizer, [*PROBE, assistant("Fine.")], add_generation_prompt=False)


class TemplateCheck:
    """Raise `BadRowError` for a normalized row that a chat template refuses: some fail with some rows only.

    Raises `InputError` if the template fails with any conversation, or there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_chat_template(tokenizer)
        self._tokenizer = tokenizer

    def __call__(self, row: Mapping[str, Any]) -> None:
        try:
            render(self._tokenizer, row["prompt"], add_generation_prompt=True)
            for response in (row[name] for name in ("chosen", "rejected") if row.get(name) is not None):
                render(self._tokenizer, [*row["prompt"], assistant(response)], add_generation_prompt=False)
        except InputError as error:
            raise BadRowError(first_line(error).rstrip(";")) from error

    def __getstate__(self) -> object:
        """Return what `Dataset.map` hashes to name its cache; the state of a tokenizer changes when it is used."""
        return self._tokenizer.name_or_path, self._tokenizer.chat_template


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special or added tokens that the chat template writes after a response: what training ends with.

    None, if the template writes text only. Raises `InputError` if the template fails, or rewrites a response.
    """
    text, _, end = render_with_span(tokenizer, [*PROBE, assistant("Fine.")], False)
    special, added = special_token_ids(tokenizer), tokenizer.added_tokens_decoder
    ids: list[int] = tokenizer(text[end:], add_special_tokens=False, verbose=False)["input_ids"]
    # Some tokenizers do not call <|im_end|> special; Gemma's have line breaks among their added tokens.
    return [n for n in ids if n in special or (n in added and added[n].content.strip())]


def turn_openers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    r"""Return the texts that begin a turn, where the chat template writes turns as plain text: "\n\nHuman:".

    None, if special tokens begin a turn, or letters alone, which a response may hold. Raises `InputError` as
    `turn_end`.
    """
    places = [f"{MARK}{place}{MARK}" for place in range(3)]
    messages = [user(places[0]), assistant(places[1]), user(places[2])]
    text = render(tokenizer, messages, add_generation_prompt=False)
    special = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(special_token_ids(tokenizer)))]
    found = []
    for first, second in pairwise(places):
        between = text.rpartition(first)[2].partition(second)[0]
        pieces = re.split("|".join(map(re.escape, special)), between) if special else [between]
        opener = pieces[-1].rstrip()
        if len(pieces) <= 2 and re.search(r"[^\W\d_]", opener) and re.search(r"[^\w\s]", opener):
            found.append(opener)
    return list(dict.fromkeys(found))


def tokenize_response(
    tokenizer: PreTrainedTokenizerBase, prompt_messages: list[Message], response: str, max_length: int
) -> TokenizedSide:
    """Tokenize prompt and response, cut to `max_length`; the mask holds the response's content tokens.

    The tokens of the template, such as the end-of-turn token after the response, and special tokens that occur in the
    response's own text are not in the mask. Raises `InputError` if the chat template is missing or refuses the
    conversation.
    """
    return _tokenize(tokenizer, [*prompt_messages, assistant(response)], max_length, add_generation_prompt=False)


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt_messages: list[Message],
    max_length: int,
    tokens: Literal["all", "last"] = "all",
) -> TokenizedSide:
    """Tokenize a prompt (ending with a user turn) followed by the generation prompt, cut to `max_length`.

    With "all" tokens, the mask holds the content tokens of the last user turn. With "last", it holds the last token of
    the sequence, special or not: the first token of the answer is predicted there, so the model's view of the whole
    prompt is there.
    """
    side = _tokenize(tokenizer, prompt_messages, None, add_generation_prompt=True)
    mask = side.mask if tokens == "all" else [False] * (len(side.mask) - 1) + [True]
    return TokenizedSide(side.input_ids[:max_length], mask[:max_length])


def batches_by_length(
    sequences: Sequence[Side], max_tokens: int, batch_size: int | None = None
) -> Iterator[list[Side]]:
    """Yield batches of sequences of like length, the longest first: one too large for memory fails at once.

    A batch holds at most `max_tokens` tokens with its padding (or one longer sequence), and `batch_size` sequences.
    """
    ordered = sorted(sequences, key=lambda sequence: len(sequence.input_ids), reverse=True)
    start = 0
    while start < len(ordered):
        size = max(1, max_tokens // len(ordered[start].input_ids))
        size = size if batch_size is None else min(size, batch_size)
        yield ordered[start : start + size]
        start += size


def padded(batch: Sequence[TokenizedSide]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, attention mask (int64) and mask (bool) of a batch, each (B, S), padded on the right."""
    shape = len(batch), max(len(sequence.input_ids) for sequence in batch)
    # Any id does for padding: attention is causal and padding is on the right, so no real token sees it.
    input_ids_BS = torch.zeros(shape, dtype=torch.int64)
    attention_mask_BS = torch.zeros(shape, dtype=torch.int64)
    mask_BS = torch.zeros(shape, dtype=torch.bool)
    for row, sequence in enumerate(batch):
        length = len(sequence.input_ids)
        input_ids_BS[row, :length] = torch.tensor(sequence.input_ids)
        attention_mask_BS[row, :length] = 1
        mask_BS[row, :length] = torch.tensor(sequence.mask)
    return input_ids_BS, attention_mask_BS, mask_BS


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], max_length: int | None, *, add_generation_prompt: bool
) -> TokenizedSide:
    """Tokenize a conversation; the mask holds the content tokens of its last message."""
    if not tokenizer.is_fast:
        raise InputError(f"{tokenizer.name_or_path} has a tokenizer without character offsets; use its fast tokenizer")
    text, start, end = render_with_span(tokenizer, messages, add_generation_prompt)
    # verbose: a sequence longer than the model's context is no cause for a warning here, it is cut off below
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    input_ids: list[int] = encoding["input_ids"]
    inside = [first < end and last > start for first, last in encoding["offset_mapping"]]
    mask = [a and b for a, b in zip(inside, content_token_mask(tokenizer, input_ids), strict=True)]
    bos = tokenizer("", verbose=False)["input_ids"][:1]
    # Some templates write BOS, some leave it to the tokenizer; without it, activations are not those of the SAE's data.
    if bos == [tokenizer.bos_token_id] and input_ids[:1] != bos:
        input_ids, mask = [*bos, *input_ids], [False, *mask]
    return TokenizedSide(input_ids[:max_length], mask[:max_length])


def render_with_span(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool
) -> tuple[str, int, int]:
    """Return the rendered conversation, and the characters of it that the last message's content spans."""
    text = render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    marks = [*messages[:-1], {**messages[-1], "content": MARK}]
    marked = render(tokenizer, marks, add_generation_prompt=add_generation_prompt)
    before, mark, after = marked.rpartition(MARK)
    start, end = len(before), len(text) - len(after)
    if not mark or start > end or not text.startswith(before) or not text.endswith(after):
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} rewrites the {messages[-1]['role']} turn beginning "
            f"{messages[-1]['content'][:40]!r};\ngive one that leaves it as it is with --chat_template_path FILE"
        )
    return text, start, end


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """Write a conversation with the chat template; special tokens in its contents stay text.

    Raises `InputError` if there is no chat template, or it fails or refuses the conversation.
    """
    if isinstance(tokenizer.chat_template, dict):
        raise InputError(
            f"{tokenizer.name_or_path} has several chat templates ({', '.join(tokenizer.chat_template)}), and none is "
            "the default;\nsave the right one to a file and give it with --chat_template_path FILE"
        )
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template;\n"
            "give one with --chat_template_path FILE, or --chat_template_path human_assistant for a base model"
        )
    given = as_text(messages, control_tokens(tokenizer))
    try:
        return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TEMPLATE_ERRORS as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} refuses a conversation of {roles}: {first_line(error)};\n"
            "leave such rows out, or give another template with --chat_template_path FILE"
        ) from error
