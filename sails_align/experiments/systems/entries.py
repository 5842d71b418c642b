"""The systems that are compared: how each is trained, edited and run, and the values that are tried of its knob.

A system with a learning rate as its knob has the plan's grid; one with a strength of its own has the default learning
rate of what it is trained with. Controls are the same with what the method chooses replaced by a random choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sails_align.core.registry import Registry
from sails_align.experiments.plan import Trainer

GUARD = "{guard}"
"""Stands for a guard of the model, made for the cell."""


@dataclass(frozen=True)
class System:
    """A way to make a model safe."""

    label: str
    page: str
    """Of the documents: `docs/<page>.md`."""
    training: tuple[str, ...] = ()
    """Options of the training. The names in braces are filled in."""
    trainer: Trainer = "sft"
    """`none`: the model is not trained."""
    knob: str = "learning rate"
    values: tuple[float, ...] = ()
    """Of the knob; empty: the plan's learning rates."""
    edits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of edits after the training, by name."""
    guard: str = ""
    """Share of harmful prompts that the model's guard may let pass; empty: it has none."""
    steering: Mapping[str, Any] = field(default_factory=dict)
    """Options of steering."""
    control_of: str = ""
    """The system that it is a control of."""
    is_of_weights: bool = True
    """Whether the result is a plain model, which can be trained further."""


def _trained(label: str, page: str, *training: str, **others: Any) -> System:
    return System(label, page, training, **others)


LORA, SAILS, FULL = ("--init", "default"), ("--init", "sails"), ("--use_peft", "false")

SYSTEMS: Registry[System] = Registry(
    "system",
    {
        "base": System("base", "testbed", trainer="none"),
        "sft-lora": _trained("SFT, LoRA", "training", *LORA),
        "sft-sails": _trained("SFT, SAILS", "method", *SAILS),
        "sft-full": _trained("SFT, full", "training", *FULL),
    },
)
