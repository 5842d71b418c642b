"""Responses from a model in this process: transformers' `generate` on batches of conversations of like length."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextStreamer,
)

from sails_align.core.artifacts import content_hash
from sails_align.evaluation.backends.local_model import Batches, decode_opening, decode_response, encode
from sails_align.evaluation.backends.stops import VERSION, Stops, StopTexts, stops_of
from sails_align.evaluation.records import GUARDED, Completion, Conversation, InferenceHook, Sampling
from sails_align.models.generation import context_length, neutral_config, neutral_generation, say_what_is_left_out
from sails_align.models.load import load_model, load_spec_tokenizer
from sails_align.models.spec import ModelSpec
from sails_align.models.threads import fitting_threads

if TYPE_CHECKING:
    from sails_align.guards.guard import Guard


class HFBackend:
    """A model and its adapter, run by transformers and PEFT (`records.Backend`).

    It ignores `Sampling.schema`: that needs vLLM or a server.

    Args:
        spec: what is loaded with the first request; None: see `of`.
        batch_size: conversations in a batch, at most; halved when memory runs out.
        hook: applied to the model while it responds.
        guard: refuses conversations before the model responds. It reads the model without the hook.
    """

    def __init__(
        self,
        spec: ModelSpec | None,
        *,
        batch_size: int = 32,
        hook: InferenceHook | None = None,
        guard: "Guard | None" = None,
    ) -> None:
        self._spec, self._batch_size, self._hook, self._guard = spec, batch_size, hook, guard
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
        """Return the model, the type of its weights, the hook and the guard."""
        hook = {} if self._hook is None else {"hook": self._hook.identity()}
        hook |= {} if self._guard is None else {"guard": self._guard.identity()}
        if self._spec is None:
            assert self._loaded is not None
            return {"backend": "hf", "model": {"name": self._loaded[0].name_or_path, "in_memory": True}, **hook}
        model = {"model": dict(self._spec.identity), "dtype": self._spec.dtype}
        return {"backend": "hf", **model, "stops": VERSION, **hook}

    def complete(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Yield the index of a conversation and its completion, batch by batch, short conversations first.

        Raises `InputError` if the model cannot be loaded, its adapter does not fit it, or it has no chat template.
        """
        if self._loaded is None:
            assert self._spec is not None
            tokenizer = load_spec_tokenizer(self._spec)
            loaded = load_model(self._spec)
            config = loaded.generation_config
            say_what_is_left_out(config, tokenizer, stops_of(tokenizer, config).ids)
            self._loaded = loaded, tokenizer
        model, tokenizer = self._loaded
        stops = stops_of(tokenizer, model.generation_config)
        was_training = model.training
        model.eval()
        try:
            refused = self._refused(model, tokenizer, conversations)
            yield from refused.items()
            asked = [index for index in range(len(conversations)) if index not in refused]
            with nullcontext() if self._hook is None else self._hook(model), neutral_generation(model, stops.ids):
                rest = [conversations[index] for index in asked]
                completions = _complete(model, tokenizer, rest, sampling, stops, self._batch_size, self._stream)
                yield from ((asked[place], completion) for place, completion in completions)
        finally:
            model.train(was_training)

    def _refused(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
    ) -> dict[int, Completion]:
        """Return the guard's refusals by the index of the conversation; none without a guard."""
        if self._guard is None:
            return {}
        messages = [conversation for conversation in conversations if not isinstance(conversation, str)]
        assert len(messages) == len(conversations), "guards read conversations, and no texts"
        is_refused = self._guard.refused(model, tokenizer, messages)
        return {index: Completion(self._guard.refusal, GUARDED) for index, one in enumerate(is_refused) if one}

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
    stops: Stops,
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
        respond = partial(_respond, model, tokenizer, prompts, sampling, stops, n_new, stream)
        for batch, completions in batches.run(respond, list(group)):
            too_long = Completion(None, error=f"out of memory with {len(prompts[batch[0]])} tokens")
            yield from zip(batch, completions or [too_long], strict=True)


@torch.inference_mode()
def _respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[int, list[int]],
    sampling: Sampling,
    stops: Stops,
    n_new: int,
    stream: Callable[[str], None] | None,
    batch: Sequence[int],
) -> list[Completion]:
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops.ids, default=0)
    rows = [torch.tensor(prompts[index]) for index in batch]
    mask, n_prompt = [torch.ones_like(row) for row in rows], max(map(len, rows))
    criteria = [StopTexts(tokenizer, stops.texts, n_prompt)] if stops.texts else []
    with _seeded(model.device, sampling, batch[0]), fitting_threads(model):
        output: Any = model.generate(  # pyright: ignore[reportCallIssue] -- transformers' type is not known to pyright
            input_ids=pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left").to(model.device),
            attention_mask=pad_sequence(mask, batch_first=True, padding_side="left").to(model.device),
            generation_config=_generation_config(sampling, n_new, stops, pad),
            stopping_criteria=StoppingCriteriaList(criteria),
            streamer=None if stream is None else _Streamer(tokenizer, stops, stream),
        )
    openings = [decode_opening(tokenizer, prompts[index]) for index in batch]
    return [
        _completion(tokenizer, opening, row, stops)
        for opening, row in zip(openings, output[:, n_prompt:].tolist(), strict=True)
    ]


def _completion(tokenizer: PreTrainedTokenizerBase, opening: str, new_tokens: list[int], stops: Stops) -> Completion:
    """Return the response in new tokens: what stands before the first thing that ends it.

    It begins with the `opening` of reasoning that the prompt ends with, if any.
    """
    end = next((place for place, token in enumerate(new_tokens) if token in stops.ids), None)
    text = decode_response(tokenizer, new_tokens[:end])
    cut = stops.cut(text)
    return Completion(opening + cut.strip(), "length" if end is None and cut == text else "stop")


class _Streamer(TextStreamer):
    """Hand over the text of a response as it comes, without what ends it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Stops, stream: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # pyright: ignore[reportArgumentType]
        self._stops, self._stream, self._text, self._n_given = stops, stream, "", 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then each token."""
        if self.next_tokens_are_prompt or value.item() not in self._stops.ids:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take a piece that further tokens do not change."""
        self._text += text
        cut = self._stops.cut(self._text)
        n_held = 0 if stream_end or cut != self._text else self._stops.held_back(cut)
        piece = cut[self._n_given : len(cut) - n_held]
        if piece:
            self._stream(piece)
            self._n_given += len(piece)


def _generation_config(sampling: Sampling, n_new: int, stops: Stops, pad: int) -> GenerationConfig:
    """Set all that decides the tokens; `neutral_generation` keeps transformers from adding values of the model's."""
    drawn = {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if sampling.temperature > 0 else {}
    drawn |= {"max_new_tokens": n_new, "do_sample": sampling.temperature > 0, "pad_token_id": pad}
    return neutral_config(sorted(stops.ids), **drawn)


@contextmanager
def _seeded(device: torch.device, sampling: Sampling, first: int) -> Iterator[None]:
    """Draw by the seed and the batch's first conversation; restore the process's own random state."""
    if sampling.temperature == 0:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(content_hash([sampling.seed, first])[:15], 16))
        yield
