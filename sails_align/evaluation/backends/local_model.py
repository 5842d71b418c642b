"""What all models in this process need: conversations as tokens, and batches that fit into memory."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.evaluation.records import Completion, Conversation

T = TypeVar("T")
Result = TypeVar("Result")


def context_length(config: PreTrainedConfig) -> int:
    """Return the maximum number of tokens of a prompt and its response together."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or sys.maxsize


def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], context: int
) -> list[list[int] | Completion]:
    """Return the token ids of each conversation up to where the response begins, or a completion with the error.

    A text that begins with a BOS gets no second one.

    Args:
        tokenizer: of the model.
        conversations: messages or texts.
        context: tokens of a prompt and its response together, at most.

    Raises:
        InputError: if messages are given and there is no chat template.
    """
    if tokenizer.chat_template is None and any(not isinstance(conversation, str) for conversation in conversations):
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template, so the model cannot be asked anything;\n"
            "give a model that was tuned for chats, an adapter whose folder has a tokenizer with a template, or a\n"
            "template by --chat_template_path (human_assistant suits base models)"
        )
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
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:  # Gemma's has no system role, for one
            return Completion(None, error=f"the chat template does not take this conversation: {error}")
    if not 0 < len(ids) < context:
        error = f"the conversation is {len(ids)} tokens long, and the model's context is {context}"
        return Completion(None, error=error)
    return ids


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
