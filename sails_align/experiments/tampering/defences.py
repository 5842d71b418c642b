"""What can be done to keep the safety of an aligned model that is trained further: before, during or after it.

Each defence has one knob, whose value is chosen on the validation part like a method's learning rate. Controls are
simple baselines, and the same methods with their directions replaced by random ones of the same size.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sails_align.core.artifacts import content_hash
from sails_align.core.registry import Registry
from sails_align.experiments.placeholders import BASE, KNOB, SEED, WORLD
from sails_align.experiments.plan import Tampering
from sails_align.experiments.tampering.attacks import ATTACKS, Attack

ALIGNED, UNALIGNED = "{aligned}", "{unaligned}"
"""Stand for models: the aligned one, and the same trained further on other harmful rows."""
ROWS, PROMPTS, HARMLESS_PROMPTS = "{rows}", "{prompts}", "{harmless_prompts}"
"""Stand for the rows that are trained on further, and harmful and harmless prompts of the alignment data."""
REFUSAL = "{refusal}"
"""Stands for how most refusals of the alignment data begin."""
UNITS, RANDOM_UNITS = "{units}", "{random_units}"
"""Stand for the units of the aligned model (`sails units`), and the same permuted within each group."""


@dataclass(frozen=True)
class Defence:
    """A defence: options of the alignment or of the further training, rows that are added, edits before or after it."""

    label: str
    knob: str = ""
    """What the knob is called in reports; empty: there is none."""
    values: tuple[float, ...] = ()
    aligning: tuple[str, ...] = ()
    """Options of the alignment."""
    before: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of edits by name. The names in braces above are filled in."""
    training: tuple[str, ...] = ()
    rate: float = 1.0
    """Factor of the learning rate; 0: the knob's value. Adapters have ten times the rate in addition."""
    after: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adds_safety_rows: bool = False
    """Whether as many rows of the alignment data as the knob says are added."""
    is_control: bool = False
    is_trained: bool = True
    """Whether the model is attacked at all, by training or otherwise."""

    @property
    def is_of_weights(self) -> bool:
        """Whether it needs no further training nor its rows, so that it works against an attack without training."""
        needs_rows = any(ROWS in options.values() for options in self.after.values())
        return not (self.training or self.adds_safety_rows or needs_rows) and self.rate == 1.0

    @property
    def undoes_changes(self) -> bool:
        """Whether it takes back changes of the aligned model's weights, and does nothing else."""
        return bool(self.after) and self.after.keys() <= {"wise_ft", "safe_lora", "irr"}

    @property
    def needs_all_weights(self) -> bool:
        """Whether it needs a further training of all weights: SIFT selects entries of the weights themselves."""
        return "--sift_rate" in self.training

    @property
    def leaves_training_alone(self) -> bool:
        """Whether an attack trains the same model as without a defence, so that cells can share the result."""
        return not (self.before or self.training or self.adds_safety_rows) and self.rate == 1.0


ADAPTER = ("--use_peft", "true", "--lora_r", "16", "--lora_alpha", "32", "--init", "default")
WITHOUT = ("aligned", "none")
"""Names of what every defence is compared with: no further training, and no defence."""
LOX = Defence("LoX", "alpha", (0.5, 1.0, 2.0, 4.0), before={"lox": {"alpha": KNOB, "k": 6, "base_model": BASE}})
ROSI = Defence(
    "ROSI",
    "rho",
    (0.05, 0.1, 0.2, 0.4),
    after={"rosi": {"rho": KNOB, "dataset_name": WORLD, "helpful_dataset_name": WORLD}},
)
SSAH = Defence(
    "SSAH",
    "share of CU",
    (0.2, 0.4, 0.5, 0.6),
    training=("--freeze_units", UNITS, "--frozen_units", "scu", f"cu:{KNOB}"),
)
SIFT = Defence("SIFT (no protected entries)", training=("--sift_rate", "0.1"), rate=10.0, is_control=True)

TASK_ARITHMETIC = Defence(
    "task arithmetic (RESTA)",
    "alpha",
    (0.5, 1.0, 2.0, 4.0),
    after={"task_arithmetic": {"alpha": KNOB, "aligned_model": ALIGNED, "unaligned_model": UNALIGNED}},
)
SAFE_LORA = Defence(
    "Safe LoRA",
    "threshold",
    (0.1, 0.2, 0.3, 0.5),
    after={"safe_lora": {"threshold": KNOB, "aligned_model": ALIGNED, "unaligned_model": BASE}},
)
LSSF = Defence(
    "LSSF",
    "alpha",
    (0.5, 1.0, 2.0, 4.0),
    after={
        "lssf": {
            "alpha": KNOB,
            "aligned_model": ALIGNED,
            "unaligned_model": UNALIGNED,
            "dataset_name": WORLD,
        }
    },
)
IRR = Defence(
    "IRR",
    "sparsity",
    (0.0, 0.25, 0.5, 0.75),
    after={
        "irr": {
            "sparsity": KNOB,
            "aligned_model": ALIGNED,
            "unaligned_model": UNALIGNED,
            "dataset_name": WORLD,
            "task_dataset_name": ROWS,
        }
    },
)
GUARDSPACE = Defence(
    "GuardSpace",
    "energy",
    (0.8, 0.9, 0.99, 0.999),
    training=(*ADAPTER[:-1], "guardspace", "--harmful_prompts", PROMPTS, "--guard_energy", KNOB),
)
SC_LORA = Defence(
    "SC-LoRA",
    "beta",
    (0.5, 0.8, 0.9, 1.0),
    training=(*ADAPTER[:-1], "sc_lora", "--harmful_prompts", PROMPTS, "--sc_lora_beta", KNOB),
)


def _randomized(defence: Defence, what: str) -> Defence:
    """Return the control of a defence: the same with random directions or units."""

    def seeded(edits: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
        return {name: {**options, "control_seed": SEED} for name, options in edits.items()}

    return replace(
        defence,
        label=f"{defence.label} (random {what})",
        before=seeded(defence.before),
        training=tuple(word.replace(UNITS, RANDOM_UNITS) for word in defence.training),
        after=seeded(defence.after),
        is_control=True,
    )


def _of_harmless_prompts(defence: Defence) -> Defence:
    """Return the control of a defence that harmful prompts tell what to protect: it is given harmless ones."""
    training = tuple(HARMLESS_PROMPTS if word == PROMPTS else word for word in defence.training)
    return replace(defence, label=f"{defence.label} (harmless prompts)", training=training, is_control=True)


DEFENCES: Registry[Defence] = Registry(
    "defence of the tampering study",
    {
        "aligned": Defence("before the attack", is_trained=False),
        "none": Defence("none"),
        "lower-rate": Defence("lower learning rate", "factor", (0.7, 0.5, 0.35, 0.25), rate=0.0, is_control=True),
        "safety-rows": Defence(
            "safety rows mixed in", "rows", (16, 32, 64, 128), adds_safety_rows=True, is_control=True
        ),
        "wise-ft": Defence(
            "WiSE-FT",
            "t",
            (0.9, 0.8, 0.7, 0.6),
            after={"wise_ft": {"t": KNOB, "aligned_model": ALIGNED}},
            is_control=True,
        ),
        "derta": Defence(
            "DeRTa",
            "RTO share",
            (0.1, 0.3, 1.0),
            aligning=("--derta_prefix_share", "1", "--derta_rto_share", KNOB, "--derta_refusal", REFUSAL),
        ),
        "lox": LOX,
        "lox-random": _randomized(LOX, "directions"),
        "task-arithmetic": TASK_ARITHMETIC,
        "task-arithmetic-random": _randomized(TASK_ARITHMETIC, "directions"),
        "safe-lora": SAFE_LORA,
        "safe-lora-random": _randomized(SAFE_LORA, "directions"),
        "lssf": LSSF,
        "lssf-random": _randomized(LSSF, "directions"),
        "irr": IRR,
        "irr-random": _randomized(IRR, "entries"),
        "rosi": ROSI,
        "rosi-random": _randomized(ROSI, "directions"),
        "ema": Defence("EMA", "half-life", (4, 8, 16, 32), training=("--ema_half_life", KNOB)),
        "ssah": SSAH,
        "ssah-random": _randomized(SSAH, "units"),
        "sift": Defence(
            "SIFT (protected entries)",
            "protected share",
            (0.25, 0.5, 0.75, 0.9),
            training=(*SIFT.training, "--sift_safety_dataset_name", WORLD, "--sift_forbidden", KNOB),
            rate=SIFT.rate,
        ),
        "sift-unprotected": SIFT,
        "constrained": Defence(
            "constrained SFT",
            "first betas",
            (0.1, 0.25, 0.5, 2.0),
            training=("--loss", "constrained", "--constrained_first_betas", *[KNOB] * 5),
        ),
        "lora": Defence(
            "LoRA",
            "factor",
            (1.0, 0.5, 0.25, 0.1),
            training=ADAPTER,
            rate=0.0,
            is_control=True,
        ),
        "guardspace": GUARDSPACE,
        "guardspace-harmless": _of_harmless_prompts(GUARDSPACE),
        "sc-lora": SC_LORA,
        "sc-lora-harmless": _of_harmless_prompts(SC_LORA),
    },
)

OWN_CONTROLS = {
    "sift": "sift-unprotected",
    **{name.rpartition("-")[0]: name for name in DEFENCES.names() if name.endswith(("-random", "-harmless"))},
}
"""The control of a defence that lacks nothing but its choice of directions, units, entries or prompts, by name."""


def tampering_of(attack: str, defence: str) -> Tampering:
    """Return what is done to a run's model, with the hash of all that makes it, besides the values that are tried."""
    made = {**asdict(ATTACKS.get(attack)), "defence": asdict(DEFENCES.get(defence))}
    for part in (made, made["defence"]):
        del part["label"]
    del made["defence"]["knob"], made["defence"]["values"]
    for name in ("facts", "gcg"):  # the keys of older results do not have them
        if not made[name]:
            del made[name]
    return Tampering(attack, defence, content_hash(made)[:16])


def can_defend(name: str, attack: Attack) -> bool:
    """Return whether a defence can be tried against an attack."""
    defence = DEFENCES.get(name)
    if not attack.trains:
        return defence.is_of_weights and (bool(attack.edit) or not defence.undoes_changes)
    is_same = defence.training == ADAPTER  # with an attacker that trains an adapter, the control `lora` is none
    return not (attack.is_lora and (defence.needs_all_weights or is_same))
