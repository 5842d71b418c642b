"""Talk to a model: `sails chat`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.core.text import PrintableStream, printable
from sails_align.data.messages import Message, assistant, user
from sails_align.evaluation.backends.hf import HFBackend
from sails_align.evaluation.backends.make import find_spec
from sails_align.evaluation.options import ChatArguments
from sails_align.evaluation.records import InferenceHook, Sampling
from sails_align.models.load import load_model, load_spec_tokenizer
from sails_align.steering import hook_of
from sails_align.steering.options import SteeringOptions


class NoAnswerError(InputError):
    """A prompt that the model cannot answer; it can answer others."""


class AdapterOff:
    """Turn the adapter of a model off while it responds (`records.InferenceHook`)."""

    def identity(self) -> dict[str, Any]:
        """Return that the adapter is off."""
        return {"adapter": "off"}

    def __call__(self, model: Any) -> AbstractContextManager[None]:
        """Turn the adapter off within the block."""
        return model.disable_adapter()


class Conversation:
    """Keep a conversation with a model, turn by turn.

    Args:
        model: with or without an adapter.
        tokenizer: of the model, with a chat template.
        sampling: of each answer.
        system_prompt: before the first turn.
        hook: applied to the model while it responds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        system_prompt: str | None = None,
        hook: InferenceHook | None = None,
    ) -> None:
        self._backend = HFBackend.of(model, tokenizer, batch_size=1, hook=hook, stream=self._add)
        self._sampling, self._answer = sampling, _Answer()
        self._start: list[Message] = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget all turns but the system prompt."""
        self.messages = list(self._start)

    def ask(self, prompt: str, show: Callable[[str], None] | None = None) -> str:
        """Add a turn of the user's and the model's answer to it. Return the answer, printable.

        Ctrl-C stops the answer: what there is of it is kept, and `KeyboardInterrupt` goes on.

        Args:
            prompt: the user's turn.
            show: called with printable pieces of the answer as they come.

        Raises:
            NoAnswerError: if the model has no answer, such as to a conversation that is longer than its context.
            InputError: if the model has no chat template.
        """
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise NoAnswerError("the prompt is no text in UTF-8; write it in UTF-8")
        asked = [*self.messages, user(prompt)]
        self._answer = _Answer(show)
        try:
            ((_, completion),) = self._backend.complete([asked], self._sampling)
        except KeyboardInterrupt:
            self._keep(asked, self._answer.text.strip())
            raise
        if completion.text is None:
            raise NoAnswerError(f"no answer: {completion.error or completion.finish_reason}")
        self._keep(asked, completion.text)
        return printable(completion.text)

    def _add(self, piece: str) -> None:
        self._answer.add(piece)

    def _keep(self, asked: list[Message], answer: str) -> None:
        if answer:
            self.messages = [*asked, assistant(answer)]


class _Answer:
    """Take an answer piece by piece, and show what is printable of it; white space only if more text follows."""

    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        self._show, self._stream, self._n_shown = show, PrintableStream(), 0
        self.text = self._printable = ""

    def add(self, piece: str) -> None:
        self.text += piece
        self._printable += self._stream.add(piece)
        text = self._printable.strip()
        if self._show is not None and len(text) > self._n_shown:
            self._show(text[self._n_shown :])
            self._n_shown = len(text)


def conversations(options: ChatArguments, steering: SteeringOptions) -> dict[str, Conversation]:
    """Load a model and start a conversation with it; with `--base`, also one with the model as it was.

    Raises `InputError` if the model, its adapter or the device cannot be used, or there is nothing to compare.
    """
    spec = find_spec(options.response())
    hook = hook_of(steering, spec)
    assert spec is not None, "it runs in this process"
    if options.base and spec.adapter is None and hook is None:
        raise InputError(
            f"--base is given, but {options.model} has neither an adapter nor steering to turn off; leave it out"
        )
    if options.device is not None:
        _check_device(options.device)
    tokenizer, model = load_spec_tokenizer(spec), load_model(spec, options.device)

    def start(hook: InferenceHook | None) -> Conversation:
        sampling = Sampling(options.max_new_tokens, options.temperature, options.seed)
        return Conversation(model, tokenizer, sampling, system_prompt=options.system_prompt, hook=hook)

    if not options.base:
        return {"model": start(hook)}
    return {"base": start(None if spec.adapter is None else AdapterOff()), "model": start(hook)}


def _check_device(name: str) -> None:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    n = 0 if found is None else torch.accelerator.device_count()
    kind = "" if found is None else found.type
    there = ["cpu", *([kind] if kind else []), *(f"{kind}:{index}" for index in range(n))]
    if name not in there:
        raise InputError(f"device is {name}, which this machine does not have; choose {', '.join(there)}")
