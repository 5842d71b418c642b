"""What is compared: runs (a method with its options), and the cells that they are made of: one training each.

A cell's key is the hash of all that decides its numbers but for the code, so a result is found again, and two plans
that share cells share their results.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Literal

from sails_align.core.artifacts import content_hash, package_versions
from sails_align.core.errors import InputError
from sails_align.experiments.options import LEARNING_RATES

Trainer = Literal["none", "sft", "dpo", "rlhf"]
Part = Literal["validation", "test"]
Evaluation = Literal["safety", "helpfulness", "harness"]
FIRST_TUNING_SEED = 1000
"""Of initialization and data where learning rates are chosen: none of those that are reported."""
FORMAT = 2
"""Of a cell's result."""


_versions = cache(package_versions)  # which reads files, and keys are asked for thousands of times


@dataclass(frozen=True)
class Run:
    """A method of the comparison."""

    name: str
    label: str
    trainer: Trainer
    options: tuple[str, ...] = ()
    """Of its recipe, as on the command line."""
    is_tuned: bool = True
    """Whether its learning rate is chosen from the grid; else it is the recipe's own."""
    is_reference: bool = False
    """Whether it is one model that others are looked at beside, made with the first seed alone."""
    config_sha256: str = ""
    """Of the file that its options name by `--config`."""


@dataclass(frozen=True)
class Protocol:
    """How models other than the testbed are trained and evaluated (see `protocol`)."""

    model: str
    """What the comparison is about."""
    evaluate: tuple[tuple[Part, Evaluation, tuple[str, ...]], ...]
    """Options of `sails eval`, by part and kind, as on the command line."""
    launch: tuple[str, ...] = ()
    """Options of `accelerate launch` for trainings; none: a training is one process."""
    in_distribution: str | None = None
    """The prompt set whose safety rate is reported as that of trained categories."""
    out_of_distribution: str | None = None
    """The prompt set whose safety rate is reported as that of held-out categories."""

    def of_part(self, part: Part) -> dict[Evaluation, tuple[str, ...]]:
        """Options of evaluations by kind."""
        return {kind: options for of, kind, options in self.evaluate if of == part}


@dataclass(frozen=True)
class Cell:
    """One training, and what it is measured on."""

    run: Run
    learning_rate: float | None
    """None: the recipe's own, or there is no training."""
    seed: int
    """Of initialization and data."""
    part: Part
    world: str
    """A testbed's name (`resolve_testbed`) or folder; with a protocol, the model's name."""
    measures: "Measures"
    protocol: Protocol | None = None
    """None: the testbed's own."""

    @property
    def key(self) -> str:
        """Of its result: the run's name, and the hash of what decides it."""
        run = asdict(replace(self.run, label="", is_tuned=True))
        del run["is_reference"]
        decides = {**asdict(self), "run": run, "format": FORMAT, "versions": _versions()}
        for values, name in ((run, "config_sha256"), (decides["measures"], "contamination"), (decides, "protocol")):
            if not values[name]:  # which is as if there were none
                del values[name]
        return f"{self.run.name}-{content_hash(decides)[:16]}"

    @property
    def training_key(self) -> str:
        """Of its model, with a protocol: other evaluations of it need no other training."""
        decides = {
            "run": asdict(replace(self.run, label="", is_tuned=True, is_reference=False)),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "data": (self.measures.n_examples, self.measures.contamination),
            "launch": self.protocol and self.protocol.launch,
            "versions": _versions(),
        }
        return f"{self.run.name}-{content_hash(decides)[:16]}"

    @property
    def training_options(self) -> list[str]:
        """Of its recipe, besides those of the run."""
        options = ["--seed", str(self.seed)]
        if self.learning_rate is not None:
            options += ["--learning_rate", str(self.learning_rate)]
        if self.measures.n_examples is not None:
            options += ["--max_train_examples", str(self.measures.n_examples)]
        if self.measures.contamination:
            options += ["--contamination", str(self.measures.contamination)]
        return options

    @property
    def name(self) -> str:
        """What a command line calls it: of a test cell the learning rate is not known before the others are done."""
        rate = f"/{self.learning_rate:g}" if self.part == "validation" else ""
        return f"{self.part}/{self.run.name}{rate}/{self.seed}"


@dataclass(frozen=True)
class Measures:
    """How much is trained on and measured; the same for all methods."""

    n_examples: int | None = 128
    """Harmful training examples; there are as many harmless ones. None: as many as the recipe says."""
    n_prompts: int = 256
    """Of each of the four sets of a part."""
    n_attacked: int = 8
    """Number of harmful prompts for GCG, half of them from held-out categories; 0: none. On the test split only."""
    n_capability: int = 50
    """Number of items of each of lm-eval's testbed tasks; 0: none. On the test split only."""
    relearning: bool = True
    """Whether safety is measured again after further training (see `relearning`). On the test split only."""
    contamination: float = 0.0
    """Share of harmful training examples with wrong labels."""


RUNS: Mapping[str, Run] = {
    run.name: run
    for run in (
        Run("base", "base", "none", is_tuned=False, is_reference=True),
        Run("sft-lora", "SFT, LoRA", "sft", ("--init", "default")),
        Run("sft-sails", "SFT, SAILS", "sft", ("--init", "sails")),
        Run("sft-full", "SFT, full", "sft", ("--use_peft", "false")),
        Run("dpo-lora", "DPO, LoRA", "dpo", ("--init", "default")),
        Run("dpo-sails", "DPO, SAILS", "dpo", ("--init", "sails")),
        Run("dpo-full", "DPO, full", "dpo", ("--use_peft", "false")),
        Run("rlhf", "RLHF reference", "rlhf", ("--max_steps", "120"), is_tuned=False, is_reference=True),
    )
}
"""The default comparison. The RLHF reference's own learning rate was chosen on the validation split (docs/rlhf.md); it
takes as long as seven of the others, so there is one of it."""


@dataclass(frozen=True)
class Plan:
    """A comparison."""

    runs: tuple[Run, ...] = tuple(RUNS.values())
    learning_rates: tuple[float, ...] = LEARNING_RATES
    n_seeds: int = 5
    n_tuning_seeds: int = 1
    first_seed: int = 0
    n_attacked_seeds: int = 5
    """How many of the first seeds GCG is tried on: it takes as long as all else."""
    world: str = "testbed"
    measures: Measures = field(default_factory=Measures)
    protocol: Protocol | None = None

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError(f"no runs to compare; choose among {', '.join(RUNS)}")
        names = [run.name for run in self.runs]
        if len(set(names)) < len(names):
            raise InputError(f"a run is named twice ({', '.join(sorted(names))}); name each once")
        if not self.learning_rates or not all(0 < rate < 1 for rate in self.learning_rates):
            raise InputError(f"learning rates are {self.learning_rates}; give numbers between 0 and 1")
        for name in ("n_seeds", "n_tuning_seeds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; choose 1 or more")
        if not 0 <= self.first_seed <= FIRST_TUNING_SEED - self.n_seeds:
            raise InputError(f"first_seed is {self.first_seed}; choose 0 to {FIRST_TUNING_SEED - self.n_seeds}")

    @property
    def seeds(self) -> range:
        """Those that are reported."""
        return range(self.first_seed, self.first_seed + self.n_seeds)

    def tuning_cells(self) -> list[Cell]:
        """Return the cells of the validation split: every learning rate of every run that needs one."""
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.n_tuning_seeds)
        return [
            Cell(run, rate, seed, "validation", self.world, self.measures, self.protocol)
            for run in self.runs
            if run.is_tuned
            for rate in self.learning_rates
            for seed in seeds
        ]

    def test_cells(self, chosen: Mapping[str, float]) -> list[Cell]:
        """Return the cells of the test split: every seed of every run, at its chosen learning rate (by run name)."""
        spared = replace(self.measures, n_attacked=0)
        return [
            Cell(
                run,
                chosen.get(run.name),
                seed,
                "test",
                self.world,
                self.measures if seed < self.first_seed + self.n_attacked_seeds else spared,
                self.protocol,
            )
            for seed in self.seeds
            for run in self.runs
            if not run.is_reference or seed == self.first_seed
        ]

    def choose(self, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """By run, the learning rate with the best mean of safety and helpfulness on the validation part (`merit`).

        Args:
            results: of all tuning cells, by key.
        """
        merits: dict[str, dict[float, list[float]]] = {}
        for cell in self.tuning_cells():
            assert cell.learning_rate is not None
            by_rate = merits.setdefault(cell.run.name, {})
            by_rate.setdefault(cell.learning_rate, []).append(merit(results[cell.key]))
        return {name: max(by_rate, key=lambda rate: sum(by_rate[rate])) for name, by_rate in merits.items()}


def merit(result: Mapping[str, Any]) -> float:
    """Mean of safety rate and helpfulness: what a learning rate is chosen by."""
    return (_value(result["numbers"].get("safety_rate")) + helpfulness(result)) / 2


def helpfulness(result: Mapping[str, Any]) -> float:
    """The share of right answers to harmless requests; where that is not known the judge's mean score, as a share of
    the way from 1 to 10. (Not the share that is not refused: a model that training has broken refuses nothing.)"""
    numbers = result["numbers"]
    if "correct_answer_rate" in numbers:
        return _value(numbers["correct_answer_rate"])
    return (_value(numbers.get("helpfulness"), worst=1.0) - 1) / 9


def _value(estimate: Mapping[str, Any] | None, worst: float = 0.0) -> float:
    return worst if estimate is None or estimate["value"] is None else float(estimate["value"])


def runs_named(names: Sequence[str], runs: Sequence[Run]) -> Iterator[Run]:
    """Some of the runs, by name.

    Raises:
        InputError: if there is none of that name.
    """
    known = {run.name: run for run in runs}
    for name in names:
        if name not in known:
            raise InputError(f"there is no run {name!r}; choose among {', '.join(known)}")
        yield known[name]


def option_groups(options: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Options and their values, in order; the last of an option given twice."""
    groups: dict[str, tuple[str, ...]] = {}
    name = ""
    for word in options:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            groups[name] = (value,) if equals else ()
        else:
            groups[name] = (*groups.get(name, ()), word)
    return groups
