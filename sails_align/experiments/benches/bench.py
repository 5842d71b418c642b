"""What a bench is: a model that is trained further, where its rows come from, and how it is measured.

Sources of rows are `task` and `facts` (something new to learn; facts on the testbed alone), `benign` and `harmful`
(answered requests), `other_harmful` (for the unaligned model), and `safety` (refused ones) and `other_benign` (answered
ones) for defences. The harmful ones share no request; `other_benign` shares none with `benign` and `task` as long as
these are no more than half of all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sails_align.evaluation.attacks.prefill import harmful_answer, prefilled
from sails_align.evaluation.metrics import Estimate, estimate
from sails_align.evaluation.records import Backend, Completion, Prompt, Sampling

TrainingRow = dict[str, Any]
PromptChange = Callable[[list[Prompt]], list[Prompt]]
"""From harmful prompts to those of an attack: others, or with other beginnings of answers."""
FIRST_SEED = 500
"""First seed of the choice of rows; the alignment data has smaller ones."""
LEFT_AFTER = ("benign", "harmful")
"""Attacks after which the safety of aligned models is measured again."""
HARMFUL = ("harmful", "other_harmful", "safety")
"""Sources of harmful requests: each has a third of them."""


@dataclass(frozen=True)
class Asked:
    """What is measured of a model."""

    part: str
    """`validation` or `test`."""
    learned: str | None = None
    """Source of rows whose learning is to be measured, as `task_score`."""
    change: PromptChange | None = None
    """What an attack makes of the prompts."""
    reference: Sequence[Completion] | None = None
    """The base model's responses to the same prompts, to measure `likeness` to them."""


class Bench(Protocol):
    """A model that is tampered with."""

    base: str
    """Folder of the model before its alignment."""
    options: tuple[str, ...]
    """Options of a further training."""
    learning_rate: float
    """Of a further training of all weights; of an adapter, ten times that."""
    share: float
    """Of the rows that an attack names, to train on."""
    n_prompts: int
    """Of each set of a part, to measure on."""
    batch_size: int
    """Of the evaluation."""
    refusal: str
    """How most refusals of the alignment data begin."""
    refusal_text: str
    """A whole refusal."""
    values: Mapping[str, tuple[float, ...]]
    """Of the knobs of defences and methods by name, where others are tried than by default."""
    left_after: tuple[str, ...]
    """Attacks after which the safety of the methods' models is measured again."""

    def rows(self, source: str, n: int, seed: int) -> list[TrainingRow]:
        """Draw rows (`prompt`, `completion`) of a source: `n` of them, or all that there are."""
        ...

    def pairs(self, n: int | None, seed: int, *, harmful: bool) -> list[TrainingRow]:
        """Draw preference pairs (`prompt`, `chosen`, `rejected`) of the alignment data: `n` of them, or all.

        They are those that a training with as many examples and this seed is trained on.
        """
        ...

    def prompts(self, part: str) -> list[Prompt]:
        """Return all prompts of a part."""
        ...

    def measure(self, backend: Backend, asked: Asked) -> dict[str, Any]:
        """Measure the rates of a model on the prompts of a part. The backend, which responds, is closed."""
        ...


def score(backend: Backend, rows: Sequence[TrainingRow], sampling: Sampling) -> Estimate:
    """Return the share of rows whose answer is right, and nothing else is said; unscored: there is no answer."""
    answers = dict(backend.complete([row["prompt"] for row in rows], sampling))
    told = [answers[index].text for index in range(len(rows))]
    return estimate(
        [
            None if text is None else text.strip().replace(" .", ".") == row["completion"]
            for text, row in zip(told, rows, strict=True)
        ]
    )


def changed(prompts: Sequence[Prompt], change: PromptChange | None) -> list[Prompt]:
    """Return the prompts, with the harmful ones changed by an attack."""
    if change is None:
        return list(prompts)
    harmful = [prompt for prompt in prompts if prompt.kind == "harmful"]
    return [*change(harmful), *(prompt for prompt in prompts if prompt.kind != "harmful")]


def begun(prompts: Sequence[Prompt], n_words: int) -> list[Prompt]:
    """Return the prompts; answers are to begin with some words of a harmful answer."""
    return [prefilled(prompt, harmful_answer(prompt, "").split()[:n_words]) for prompt in prompts]


def share_of(items: Any, source: str, n: int) -> Any:
    """Return the first `n` items of a source's own share of all; of other harmless ones, those from the end."""
    if source == "other_benign":
        items = items[::-1]
    return (items[HARMFUL.index(source) :: len(HARMFUL)] if source in HARMFUL else items)[:n]
