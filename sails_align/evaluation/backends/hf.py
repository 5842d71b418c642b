"""Responses from a model in this process: conversations of like length share a batch of transformers' `generate`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.artifacts import content_hash
from sails_align.core.errors import InputError
from sails_align.evaluation.backends.local_model import context_length, encode
from sails_align.evaluation.records import Completion, Conversation, InferenceHook, Message, Sampling
from sails_align.models.load import load_model, load_spec_tokenizer
from sails_align.models.spec import ModelSpec


class HFBackend:
    """A model and its adapter, run by transformers and PEFT (`records.Backend`).

    `Sampling.schema` is not kept to: that needs vLLM or a server.

    Args:
        spec: what is loaded, when it is first asked something; None: `model` is in memory, and stays there.
        batch_size: conversations in a batch, at most; halved where memory does not suffice.
        device: None: the accelerator, if there is one.
        model: as loaded already; with `tokenizer`. Its mode (train or eval) is restored after each use.
        tokenizer: likewise.
        hook: applied to the model while it responds.
    """

    def __init__(
        self,
        spec: ModelSpec | None,
        *,
        batch_size: int = 32,
        device: str | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        hook: InferenceHook | None = None,
    ) -> None:
        assert spec is not None or (model is not None and tokenizer is not None)
        self._spec, self._batch_size, self._device, self._hook = spec, batch_size, device, hook
        self._model, self._tokenizer = model, tokenizer

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 128,
        hook: InferenceHook | None = None,
    ) -> "HFBackend":
        """Wrap a model in memory, with or without an adapter. Do not cache its responses: nothing tells its state."""
        return cls(None, batch_size=batch_size, model=model, tokenizer=tokenizer, hook=hook)

    def identity(self) -> dict[str, Any]:
        """The model, the type of its weights, and the hook."""
        hook = {} if self._hook is None else {"hook": self._hook.identity()}
        if self._spec is None:
            assert self._model is not None
            return {"backend": "hf", "model": {"name": self._model.name_or_path, "in_memory": True}, **hook}
        return {"backend": "hf", "model": dict(self._spec.identity), "dtype": self._spec.dtype, **hook}

    def complete(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Index of a conversation and its completion, batch by batch, short conversations first.

        Raises:
            InputError: if the model cannot be loaded, its adapter does not fit it, or it has no chat template.
        """
        if self._model is None or self._tokenizer is None:
            assert self._spec is not None
            self._tokenizer = load_spec_tokenizer(self._spec)
            self._model = load_model(self._spec, self._device)
        model, was_training = self._model, self._model.training
        model.eval()
        try:
            with nullcontext() if self._hook is None else self._hook(model):
                yield from _complete(model, self._tokenizer, conversations, sampling, self._batch_size)
        finally:
            model.train(was_training)

    def close(self) -> None:
        """Give back the memory of a model that was loaded here."""
        from accelerate.utils.memory import clear_device_cache

        if self._spec is not None:
            self._model = self._tokenizer = None
            clear_device_cache(garbage_collection=True)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int = 128,
) -> list[str]:
    """Greedy responses to conversations that end with a user turn, in order.

    The model's mode (train or eval) is restored.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer, with a chat template.
        conversations: messages.
        max_new_tokens: of each response, at most.
        batch_size: conversations in a batch.

    Raises:
        InputError: if there is no response to one: it is longer than the model's context, ...
    """
    responses = [""] * len(conversations)
    backend = HFBackend.of(model, tokenizer, batch_size=batch_size)
    for index, completion in backend.complete(conversations, Sampling(max_new_tokens)):
        if completion.text is None:
            raise InputError(f"no response to conversation {index}: {completion.error}; leave it out, or shorten it")
        responses[index] = completion.text
    return responses


def _complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    sampling: Sampling,
    batch_size: int,
) -> Iterator[tuple[int, Completion]]:
    from accelerate.utils.memory import clear_device_cache

    context = context_length(model.config)
    prompts: dict[int, list[int]] = {}
    for index, encoded in enumerate(encode(tokenizer, conversations, context)):
        if isinstance(encoded, Completion):
            yield index, encoded
        else:
            prompts[index] = encoded
    order = sorted(prompts, key=lambda index: len(prompts[index]))
    # What fills the context has room for fewer tokens, and is put only with what has room for as many.
    for n_new, group in groupby(order, key=lambda index: min(sampling.max_new_tokens, context - len(prompts[index]))):
        waiting = list(group)
        while waiting:
            batch = waiting[:batch_size]
            completions = _respond(model, tokenizer, [prompts[index] for index in batch], sampling, n_new, batch[0])
            if completions is None:
                clear_device_cache(garbage_collection=True)
                batch_size = max(1, len(batch) // 2)
                if len(batch) > 1:
                    continue
                completions = [Completion(None, error=f"out of memory with {len(prompts[batch[0]])} tokens")]
            yield from zip(batch, completions, strict=True)
            waiting = waiting[len(batch) :]


def _respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    n_new: int,
    first: int,
) -> list[Completion] | None:
    """Completions of a batch, the first conversation of which has an index; None if memory does not suffice."""
    from accelerate.utils.memory import should_reduce_batch_size

    stop = _stop_ids(model, tokenizer)
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stop, default=0)
    config = _generation_config(sampling, n_new, stop, pad)
    try:
        with _seeded(model.device, sampling, first):
            new_tokens = _new_tokens(model, prompts, config)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error):
            return None
        raise
    ends = [next((place for place, token in enumerate(row) if token in stop), None) for row in new_tokens]
    texts = tokenizer.batch_decode(
        [row[:end] for row, end in zip(new_tokens, ends, strict=True)],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,  # which Llama 3's asks for, and vLLM does not do
    )
    return [
        Completion(text.strip(), "length" if end is None else "stop") for text, end in zip(texts, ends, strict=True)
    ]


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's EOS, and those of generation_config.json (Gemma's <end_of_turn>, Llama's <|eot_id|>)."""
    of_model = model.generation_config.eos_token_id if model.generation_config else None
    ids: list[Any] = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    return {token for token in ids if token is not None}


def _generation_config(sampling: Sampling, n_new: int, stop: set[int], pad: int) -> GenerationConfig:
    """All that decides the tokens is given, else transformers takes it from the model's generation_config.json.

    vLLM does not: a repetition penalty there, as Qwen has, would make responses of the two differ.
    """
    drawn = {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if sampling.temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=n_new,
        do_sample=sampling.temperature > 0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(stop) or None,
        pad_token_id=pad,
        **drawn,
    )


@contextmanager
def _seeded(device: torch.device, sampling: Sampling, first: int) -> Iterator[None]:
    """Draw what the seed and the batch decide; the process's own random state is as before."""
    if sampling.temperature == 0:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(content_hash([sampling.seed, first])[:15], 16))
        yield


@torch.inference_mode()
def _new_tokens(model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    rows = [torch.tensor(ids) for ids in prompts]
    pad = config.pad_token_id
    assert isinstance(pad, int)
    output: Any = model.generate(  # pyright: ignore[reportCallIssue] -- transformers' type is not known to pyright
        input_ids=pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left").to(model.device),
        attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left").to(
            model.device
        ),
        generation_config=config,
    )
    return output[:, max(map(len, prompts)) :].tolist()
