"""What all models in this process need: conversations as tokens, and batches that fit into memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedTokenizerBase

from sails_align.core.errors import InputError, first_line
from sails_align.data.tokens import as_text, check_chat_template, control_tokens, render
from sails_align.evaluation.reasoning import marks_of, opening_of
from sails_align.evaluation.records import Completion, Conversation

OPENING = 16
"""Tokens at the end of a prompt that are searched for the beginning of reasoning."""
T = TypeVar("T")
Result = TypeVar("Result")


def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], context: int
) -> list[list[int] | Completion]:
    """Return the token ids of each conversation up to where the response begins, or a completion with the error.

    A text that begins with a BOS gets no second one.

    Args:
        tokenizer: of the model.
        conversations: messages or texts. The response goes on after a last message of the assistant.
        context: tokens of a prompt and its response together, at most.

    Raises:
        InputError: if messages are given, and there is no chat template or it fails with any.
    """
    return [_encode_one(tokenizer, conversation, context) for conversation in conversations]


def _encode_one(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, context: int) -> list[int] | Completion:
    ids: Any
    if isinstance(conversation, str):
        # Without truncation, but also without the warning that the text is longer than the model takes.
        ids = tokenizer(conversation, verbose=False)["input_ids"]
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
            ids = ids[1:]
    else:
        messages = [dict(message) for message in conversation]
        begun = [messages.pop()] if messages[-1]["role"] == "assistant" else []
        try:
            text = render(tokenizer, messages, add_generation_prompt=True)
            text += "".join(message["content"] for message in as_text(begun, control_tokens(tokenizer)))
        except InputError as error:  # Gemma's has no system role, for one
            check_chat_template(tokenizer)  # one that takes no conversation at all is an error
            return Completion(None, error=first_line(error))
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not 0 < len(ids) < context:
        error = f"the conversation is {len(ids)} tokens long, and the model's context is {context}"
        return Completion(None, error=error)
    return ids


def decode_response(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of a response without special tokens, except those that mark reasoning."""
    names = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    marks = marks_of(names.values())
    kept = [token for token in tokens if token not in names or names[token] in marks]
    # Without the clean-up of spaces that Llama 3's tokenizer asks for, and that vLLM does not do.
    return str(tokenizer.decode(kept, skip_special_tokens=not marks, clean_up_tokenization_spaces=False))


def decode_opening(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str:
    """Return the beginning of reasoning that the chat template wrote at a prompt's end; mostly none."""
    return opening_of(str(tokenizer.decode(list(prompt[-OPENING:]), clean_up_tokenization_spaces=False)))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


class Batches:
    """Compute in batches, whose size is halved when memory runs out, and stays so.

    Args:
        size: items in a batch, at most.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def run(
        self, compute: Callable[[Sequence[T]], Result], items: Sequence[T]
    ) -> Iterator[tuple[Sequence[T], Result | None]]:
        """Yield each batch of the items and its result; None if memory does not suffice for a single item."""
        start = 0
        while start < len(items):
            batch = items[start : start + self._size]
            try:
                result = compute(batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                result = None
            if result is None:  # memory can be freed only after the exception is gone
                clear_device_cache(garbage_collection=True)
                self._size = max(1, len(batch) // 2)
                if len(batch) > 1:
                    continue
            yield batch, result
            start += len(batch)
