"""What can be done to keep the safety of an aligned model that is trained further: before, during or after it.

Each defence has one knob, whose value is chosen on the validation part like a method's learning rate. Controls are
defences that need no idea, and the same methods with their directions replaced by random ones of the same size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sails_align.core.registry import Registry

KNOB = "{knob}"
"""Stands for the knob's value in options."""


@dataclass(frozen=True)
class Defence:
    """A defence: edits before the further training, options of it, rows that are added to it, edits after it."""

    label: str
    knob: str = ""
    """What the knob is called in reports; empty: there is none."""
    values: tuple[float, ...] = ()
    before: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of edits by name. A value `KNOB` is the knob's; options that name models are filled in."""
    training: tuple[str, ...] = ()
    rate: float = 1.0
    """Factor of the learning rate; 0: the knob's value."""
    after: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adds_safety_rows: bool = False
    """Whether as many rows of the alignment data as the knob says are added."""
    is_control: bool = False
    is_trained: bool = True
    """Whether the model is trained further at all."""


WITHOUT = ("aligned", "none")
"""Names of what every defence is compared with: no further training, and no defence."""
DEFENCES: Registry[Defence] = Registry(
    "defence of the tampering study",
    {
        "aligned": Defence("before the further training", is_trained=False),
        "none": Defence("none"),
        "lower-rate": Defence("lower learning rate", "factor", (0.7, 0.5, 0.35, 0.25), rate=0.0, is_control=True),
        "safety-rows": Defence("safety rows mixed in", "rows", (8, 16, 32, 64), adds_safety_rows=True, is_control=True),
        "wise-ft": Defence(
            "WiSE-FT", "t", (0.9, 0.8, 0.7, 0.6), after={"wise_ft": {"t": KNOB, "aligned_model": ""}}, is_control=True
        ),
        "lox": Defence("LoX", "alpha", (0.5, 1.0, 2.0, 4.0), before={"lox": {"alpha": KNOB, "k": 6, "base_model": ""}}),
        "lox-random": Defence(
            "LoX, random directions",
            "alpha",
            (0.5, 1.0, 2.0, 4.0),
            before={"lox": {"alpha": KNOB, "k": 6, "base_model": "", "control_seed": 0}},
            is_control=True,
        ),
        "task-arithmetic": Defence(
            "task arithmetic (RESTA)",
            "alpha",
            (0.25, 0.5, 1.0, 2.0),
            after={"task_arithmetic": {"alpha": KNOB, "aligned_model": "", "unaligned_model": ""}},
        ),
        "safe-lora": Defence(
            "Safe LoRA",
            "threshold",
            (0.05, 0.1, 0.2, 0.3),
            after={"safe_lora": {"threshold": KNOB, "aligned_model": "", "unaligned_model": "base"}},
        ),
    },
)
