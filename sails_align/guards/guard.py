"""A guard: a projector on the hidden states of one layer of one model, and the threshold that was certified for it.

<guard>/projector/     its weights, and what it was fitted on
<guard>/calibration/   scores of the calibration's harmful prompts, the threshold and its bounds

Shapes: N prompts, D d_model.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.artifacts import content_hash, load_artifact, read_header, tensors_hash
from sails_align.core.errors import InputError
from sails_align.data.messages import Message
from sails_align.data.splits import prompt_key
from sails_align.data.tokens import check_chat_template, render, tokenize_prompt
from sails_align.edits.logits import checked_device
from sails_align.guards.projector import Projector
from sails_align.models.generation import context_length
from sails_align.models.load import load_model, load_spec_tokenizer
from sails_align.models.resolve import resolve_model
from sails_align.models.spec import ModelSpec
from sails_align.subspace.concepts import last_token_states

PROJECTOR, CALIBRATION = "projector", "calibration"


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, and what it is."""

    spec: ModelSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def open(
        cls, name: str, base_model: str | None = None, device: str | None = None, chat_template: str | None = None
    ) -> "LoadedModel":
        """Load a model, whose chat template is its own by default; raise `InputError` if there is none of that name."""
        spec = resolve_model(name, base_model).with_chat_template(chat_template)
        return cls(spec, load_model(spec, checked_device(device)), load_spec_tokenizer(spec))


@dataclass(frozen=True)
class ScoredPrompts:
    """Prompts with a guard's scores, all tuples of the same length."""

    hashes: tuple[str, ...]
    is_harmful: tuple[bool, ...]
    categories: tuple[str, ...]
    scores: tuple[float | None, ...]
    """None: the model's chat template refuses the prompt, or it is longer than the context."""

    @classmethod
    def of(cls, guard: "Guard", model: LoadedModel, prompts: Sequence[tuple[Sequence[Message], bool, str]]) -> Self:
        """Score prompts: messages, whether they are harmful, and their category. Raises `InputError` as `scores`."""
        messages, is_harmful, categories = zip(*prompts, strict=True)
        hashes = tuple(map(prompt_hash, messages))
        return cls(hashes, is_harmful, categories, tuple(guard.scores(model.model, model.tokenizer, messages)))

    def chosen(self, places: Iterable[int]) -> "ScoredPrompts":
        """Return those at some places."""
        places = list(places)
        columns = (self.hashes, self.is_harmful, self.categories, self.scores)
        return ScoredPrompts(*(tuple(column[place] for place in places) for column in columns))  # pyright: ignore

    def once(self) -> "ScoredPrompts":
        """Return each prompt once: one that two sets share would count twice in a bound."""
        first = {key: place for place, key in reversed([*enumerate(zip(self.hashes, self.is_harmful, strict=True))])}
        return self.chosen(sorted(first.values()))

    def places(self, *, harmful: bool) -> list[int]:
        """Return the places of the scored prompts of a kind."""
        kinds = zip(self.is_harmful, self.scores, strict=True)
        return [place for place, (kind, score) in enumerate(kinds) if kind == harmful and score is not None]


@dataclass(frozen=True, eq=False)
class Calibration:
    """The threshold of a guard, and what is known of it."""

    harmful: Tensor
    """Scores of the harmful prompts, ascending, float64."""
    about: Mapping[str, Any]
    """JSON-able; `threshold` is None if nothing is certified."""

    def refuses(self, score: float) -> bool:
        """Return whether a prompt is refused; without a certified threshold, every prompt is."""
        threshold = self.about["threshold"]
        return threshold is None or score >= threshold


@dataclass(frozen=True, eq=False)
class Guard:
    """A projector with its layer, and its calibration if it has one."""

    folder: Path
    projector: Projector
    thresholds: Tensor
    """Those that a calibration tests, ascending, float64."""
    about: Mapping[str, Any]
    """JSON-able: layer, model, hashes of the prompts that it was fitted on, ..."""
    calibration: Calibration | None
    refusal: ClassVar[str] = "Sorry, I can not help with that."
    """What a refused prompt is answered."""

    @classmethod
    def load(cls, folder: Path) -> "Guard":
        """Load a guard; raise `InputError` if there is none. A calibration of an earlier guard does not count."""
        if not (folder / PROJECTOR).is_dir():
            raise InputError(f"{folder} holds no guard; make one with sails guard fit MODEL --output {folder}")
        tensors, header = load_artifact(folder / PROJECTOR, PROJECTOR)
        thresholds = tensors.pop("thresholds")
        guard = cls(folder, Projector.of(tensors), thresholds, header["provenance"], None)
        if read_header(folder / CALIBRATION, CALIBRATION) is None:
            return guard
        tensors, header = load_artifact(folder / CALIBRATION, CALIBRATION)
        about = header["provenance"]
        if about["guard_hash"] != guard.hash:
            return guard
        return cls(folder, guard.projector, thresholds, guard.about, Calibration(tensors["harmful"], about))

    @cached_property
    def hash(self) -> str:
        """Hash of all that decides the scores on its model."""
        return content_hash([tensors_hash(self.projector.state_dict()), self.about["layer"], self.about["model_hash"]])

    @property
    def calibrated(self) -> Calibration:
        """The calibration; raise `InputError` without one."""
        if self.calibration is None:
            raise InputError(f"the guard {self.folder} has no threshold yet; run sails guard calibrate {self.folder}")
        return self.calibration

    def check_model(self, spec: ModelSpec) -> None:
        """Raise `InputError` for another model than the one that the guard was fitted on."""
        if model_hash(spec) != self.about["model_hash"]:
            raise InputError(
                f"the guard {self.folder} was fitted on {self.about['model']}, and {spec.name} is another model: "
                "weights, adapter, tokenizer, chat template or --dtype differ, and so do the scores;\n"
                f"make a guard for it with sails guard fit {spec.name}"
            )

    def identity(self) -> dict[str, Any]:
        """Return all that decides which prompts are refused, and the certificate; JSON-able."""
        return {"guard": self.hash, "refusal": self.refusal, **certificate(self.calibrated)}

    def scores(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]]
    ) -> list[float | None]:
        """Return the score of each prompt; None if the chat template refuses it, or it is longer than the context.

        What a response is made to begin with, a last turn of the assistant, is not read.

        Raises:
            InputError: if the chat template takes no conversation at all.
        """
        asked = [list(prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt) for prompt in prompts]
        context = context_length(model.config)
        places = [place for place, prompt in enumerate(asked) if _fits(tokenizer, prompt, context)]
        found: list[float | None] = [None] * len(asked)
        if places:
            layer = self.about["layer"]
            states = last_token_states(model, tokenizer, [layer], [asked[place] for place in places], sys.maxsize)
            for place, score in zip(places, self.projector.scores(states[layer]).tolist(), strict=True):
                found[place] = score
        if any(score is not None and score != score for score in found):
            raise InputError(f"the guard {self.folder} gave a score that is no number; check that the model is whole")
        return found

    def refused(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]]
    ) -> list[bool]:
        """Return whether each prompt is refused; one without a score is left to the model, and fails there."""
        scores = self.scores(model, tokenizer, prompts)
        return [score is not None and self.calibrated.refuses(score) for score in scores]


def is_renderable(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> bool:
    """Return whether a chat template takes a prompt; raise `InputError` if it takes no conversation at all."""
    try:
        render(tokenizer, prompt, add_generation_prompt=True)
    except InputError:
        check_chat_template(tokenizer)
        return False
    return True


def _fits(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], context: int) -> bool:
    """Return whether the chat template takes a prompt, and the model's context has room for a response."""
    if not is_renderable(tokenizer, prompt):
        return False
    return len(tokenize_prompt(tokenizer, list(prompt), sys.maxsize).input_ids) < context


def model_hash(spec: ModelSpec) -> str:
    """Return the hash of a model's files (or its commit on the hub) and the type of its weights."""
    return content_hash([dict(spec.identity), spec.dtype])


def prompt_hash(prompt: Iterable[Message]) -> str:
    """Return the hash of a prompt; system messages, letter case and white space make no difference."""
    return content_hash(prompt_key(turn for turn in prompt if turn["role"] != "system"))[:16]


def certificate(calibration: Calibration) -> dict[str, Any]:
    """Return what a result says of the guard that it was made with."""
    names = ("threshold", "n_harmful", "n_harmless", "max_pass", "max_over_refusal", "delta", "data_hash", "holds_for")
    return {name: calibration.about[name] for name in names}
