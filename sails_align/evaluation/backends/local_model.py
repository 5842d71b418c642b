"""Conversations as a model of one's own reads them."""

import sys
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.evaluation.records import Completion, Conversation


def context_length(config: PreTrainedConfig) -> int:
    """Tokens of a prompt and its response together, at most."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or sys.maxsize


def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], context: int
) -> list[list[int] | Completion]:
    """Token ids of each conversation up to where the response begins; or the error, if there is no way to respond.

    A text is not given a second BOS if it begins with one.

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
    encoded: list[list[int] | Completion] = []
    for conversation in conversations:
        try:
            ids = _ids(tokenizer, conversation)
        except TemplateError as error:  # Gemma's has no system role, for one
            encoded.append(Completion(None, error=f"the chat template does not take this conversation: {error}"))
            continue
        if not 0 < len(ids) < context:
            error = f"the conversation is {len(ids)} tokens long, and the model's context is {context}"
            encoded.append(Completion(None, error=error))
        else:
            encoded.append(ids)
    return encoded


def _ids(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    if isinstance(conversation, str):
        # Without truncation, but also without the warning that the text is longer than the model takes.
        ids: Any = tokenizer(conversation, verbose=False)["input_ids"]
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id else ids
    ids = tokenizer.apply_chat_template(
        [dict(message) for message in conversation], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids
