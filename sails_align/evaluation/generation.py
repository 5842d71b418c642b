"""Responses from a Hugging Face model: greedy, batched by length."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, str]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int = 128,
) -> list[str]:
    """Greedy responses to conversations that end with a user turn, in order.

    Prompts of like length share a batch (padded on the left); the model's mode (train or eval) is restored.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer, with a chat template.
        conversations: messages.
        max_new_tokens: of each response, at most.
        batch_size: conversations in a batch.
    """
    prompts: list[Any] = [
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
        for messages in conversations
    ]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    responses = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            padded: dict[str, Any] = {"input_ids": [prompts[index] for index in batch]}
            encoded = tokenizer.pad(padded, padding_side="left", return_tensors="pt").to(model.device)
            output = model.generate(  # pyright: ignore[reportCallIssue] -- transformers' type is not known to pyright
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            new_tokens = output[:, encoded["input_ids"].shape[1] :]
            for index, text in zip(batch, tokenizer.batch_decode(new_tokens, skip_special_tokens=True), strict=True):
                responses[index] = text.strip()
    finally:
        model.train(was_training)
    return responses
