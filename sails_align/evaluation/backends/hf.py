"""Responses from a model in this process: transformers' `generate` on batches of conversations of like length."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from sails_align.core.artifacts import content_hash
from sails_align.evaluation.backends.local_model import Batches, context_length, encode
from sails_align.evaluation.records import Completion, Conversation, InferenceHook, Sampling
from sails_align.models.load import load_model, load_spec_tokenizer
from sails_align.models.spec import ModelSpec


class HFBackend:
    """A model and its adapter, run by transformers and PEFT (`records.Backend`).

    It ignores `Sampling.schema`: that needs vLLM or a server.

    Args:
        spec: what is loaded with the first request; None: see `of`.
        batch_size: conversations in a batch, at most; halved when memory runs out.
        hook: applied to the model while it responds.
    """

    def __init__(self, spec: ModelSpec | None, *, batch_size: int = 32, hook: InferenceHook | None = None) -> None:
        self._spec, self._batch_size, self._hook = spec, batch_size, hook
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._stream: Callable[[str], None] | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 128,
        hook: InferenceHook | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> "HFBackend":
        """Wrap a model in memory, with or without an adapter. Do not cache its responses: nothing tells its state.

        Its mode (train or eval) is restored after each use. `stream` is called with each piece of a response as it
        comes; conversations must then come one at a time.
        """
        backend = cls(None, batch_size=batch_size, hook=hook)
        backend._loaded, backend._stream = (model, tokenizer), stream
        return backend

    def identity(self) -> dict[str, Any]:
        """Return the model, the type of its weights, and the hook."""
        hook = {} if self._hook is None else {"hook": self._hook.identity()}
        if self._spec is None:
            assert self._loaded is not None
            return {"backend": "hf", "model": {"name": self._loaded[0].name_or_path, "in_memory": True}, **hook}
        return {"backend": "hf", "model": dict(self._spec.identity), "dtype": self._spec.dtype, **hook}

    def complete(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Yield the index of a conversation and its completion, batch by batch, short conversations first.

        Raises:
            InputError: if the model cannot be loaded, its adapter does not fit it, or it has no chat template.
        """
        if self._loaded is None:
            assert self._spec is not None
            tokenizer = load_spec_tokenizer(self._spec)
            self._loaded = load_model(self._spec), tokenizer
        model, tokenizer = self._loaded
        was_training = model.training
        model.eval()
        try:
            with nullcontext() if self._hook is None else self._hook(model):
                yield from _complete(model, tokenizer, conversations, sampling, self._batch_size, self._stream)
        finally:
            model.train(was_training)

    def close(self) -> None:
        """Free the memory of a model that was loaded here."""
        if self._spec is not None:
            self._loaded = None
            clear_device_cache(garbage_collection=True)


def _complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    sampling: Sampling,
    batch_size: int,
    stream: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, Completion]]:
    context = context_length(model.config)
    prompts: dict[int, list[int]] = {}
    for index, encoded in enumerate(encode(tokenizer, conversations, context)):
        if isinstance(encoded, Completion):
            yield index, encoded
        else:
            prompts[index] = encoded
    order, batches = sorted(prompts, key=lambda index: len(prompts[index])), Batches(batch_size)
    # A prompt that fills the context has room for fewer tokens; a batch is of prompts with room for as many.
    for n_new, group in groupby(order, key=lambda index: min(sampling.max_new_tokens, context - len(prompts[index]))):
        respond = partial(_respond, model, tokenizer, prompts, sampling, n_new, stream)
        for batch, completions in batches.run(respond, list(group)):
            too_long = Completion(None, error=f"out of memory with {len(prompts[batch[0]])} tokens")
            yield from zip(batch, completions or [too_long], strict=True)


@torch.inference_mode()
def _respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[int, list[int]],
    sampling: Sampling,
    n_new: int,
    stream: Callable[[str], None] | None,
    batch: Sequence[int],
) -> list[Completion]:
    stop = _stop_ids(model, tokenizer)
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stop, default=0)
    rows = [torch.tensor(prompts[index]) for index in batch]
    mask = [torch.ones_like(row) for row in rows]
    with _seeded(model.device, sampling, batch[0]):
        output: Any = model.generate(  # pyright: ignore[reportCallIssue] -- transformers' type is not known to pyright
            input_ids=pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left").to(model.device),
            attention_mask=pad_sequence(mask, batch_first=True, padding_side="left").to(model.device),
            generation_config=_generation_config(sampling, n_new, stop, pad),
            streamer=None if stream is None else _Streamer(tokenizer, stop, stream),
        )
    new_tokens: list[list[int]] = output[:, max(map(len, rows)) :].tolist()
    ends = [next((place for place, token in enumerate(row) if token in stop), None) for row in new_tokens]
    texts = tokenizer.batch_decode(
        [row[:end] for row, end in zip(new_tokens, ends, strict=True)],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,  # which Llama 3's asks for, and vLLM does not do
    )
    return [
        Completion(text.strip(), "length" if end is None else "stop") for text, end in zip(texts, ends, strict=True)
    ]


class _Streamer(TextStreamer):
    """Hand over the text of a response as it comes, without what ends it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: set[int], stream: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # pyright: ignore[reportArgumentType]
        self._stop, self._stream = stop, stream

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then each token."""
        if self.next_tokens_are_prompt or value.item() not in self._stop:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take a piece that further tokens do not change."""
        self._stream(text)


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokenizer's EOS and those of generation_config.json (Gemma's <end_of_turn>, Llama's <|eot_id|>)."""
    of_model = model.generation_config.eos_token_id if model.generation_config else None
    ids: list[Any] = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    return {token for token in ids if token is not None}


def _generation_config(sampling: Sampling, n_new: int, stop: set[int], pad: int) -> GenerationConfig:
    """Set all that decides the tokens: transformers would take the rest from the model's generation_config.json.

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
    """Draw by the seed and the batch's first conversation; restore the process's own random state."""
    if sampling.temperature == 0:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(content_hash([sampling.seed, first])[:15], 16))
        yield
