"""Define what is compared: runs (a method with its options), and their cells (one training each).

A cell's key is the hash of all that decides its numbers, except the code. So results are found again, and plans that
share cells share results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Literal

from sails_align.core.artifacts import content_hash, package_versions
from sails_align.core.errors import InputError
from sails_align.core.options import check_least
from sails_align.experiments.merits import at_worst, kept, merit
from sails_align.experiments.options import LEARNING_RATES
from sails_align.experiments.tuning import Tuning, beyond_end

Trainer = Literal["none", "sft", "dpo", "rlhf"]
Part = Literal["validation", "test"]
Evaluation = Literal["safety", "helpfulness", "divergence", "harness"]
FIRST_TUNING_SEED = 1000
"""First seed that learning rates are chosen with; reported seeds are smaller."""
FORMAT = 2
"""Of a cell's result."""
CellResults = Mapping[str, Mapping[str, Any]]
"""Results of cells, by key."""
_OPTIONAL = ("files_sha256", "grid", "tampering", "method")
"""Of a run: left out of the key where empty."""
_versions = cache(package_versions)  # which reads files, and keys are computed thousands of times


@dataclass(frozen=True)
class Tampering:
    """What is done to a run's model: see `tampering`."""

    attack: str
    defence: str
    sha256: str = ""
    """Hash of all that makes the two."""


@dataclass(frozen=True)
class Run:
    """A method of the comparison."""

    name: str
    label: str
    trainer: Trainer
    options: tuple[str, ...] = ()
    """Options of its recipe, as on the command line."""
    is_tuned: bool = True
    """Whether its learning rate is chosen from the grid; otherwise the recipe's is used."""
    is_reference: bool = False
    """Whether it is a single model to compare with, made with the first seed only."""
    files_sha256: str = ""
    """Hash of all files and folders that its options name (`contents`)."""
    grid: tuple[float, ...] = ()
    """Values of a knob of its own, which is tuned in place of the learning rate; empty: it has none."""
    tampering: Tampering | None = None
    """What is done to its model before it is measured."""
    method: str = ""
    """Hash of all that makes the method of its name, in the study `methods`; empty: it is none."""

    @property
    def learning_rate(self) -> float | None:
        """The learning rate that its options give; None: they give none, or it is tuned, or has a bench."""
        given = option_groups(self.options).get("--learning_rate")
        return None if self.is_tuned or self.has_bench or not given else float(given[0])

    @property
    def has_bench(self) -> bool:
        """Whether it is trained and measured by a bench (see `benches`), and not by a recipe and `sails eval`."""
        return bool(self.method or self.tampering)


@dataclass(frozen=True)
class Protocol:
    """How models other than the testbed are trained and evaluated (see `protocol`)."""

    model: str
    """Name of the base model in the report."""
    evaluate: tuple[tuple[Part, Evaluation, tuple[str, ...]], ...]
    """Options of `sails eval`, by part and kind, as on the command line."""
    launch: tuple[str, ...] = ()
    """Options of `accelerate launch`; empty: a training is one process."""
    launch_sha256: str = ""
    """Hash of the files that `launch` names."""
    files_sha256: str = ""
    """Hash of the files and folders that `evaluate` names."""
    in_distribution: str | None = None
    """Prompt set of the trained categories."""
    out_of_distribution: str | None = None
    """Prompt set of the held-out categories."""

    def of_part(self, part: Part) -> dict[Evaluation, tuple[str, ...]]:
        """Return the options of each evaluation of a part."""
        return {kind: options for of, kind, options in self.evaluate if of == part}


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation."""

    run: Run
    learning_rate: float | None
    """None: the recipe's own, or there is no training."""
    seed: int
    """Seed of initialization and data."""
    part: Part
    world: str
    """Name or folder of a testbed; with a protocol, the model's name."""
    measures: "Measures"
    protocol: Protocol | None = None
    """None: the testbed's own."""
    world_sha256: str = ""
    """Hash of the world, if it is a folder."""

    @property
    def key(self) -> str:
        """Key of the result: the run's name, and the hash of what decides the result.

        What decides other cells only is no part of it: the other values of a grid, and the evaluations of the other
        part (a bench has its own).
        """
        run = {**asdict(replace(self.run, label="", is_tuned=True)), "grid": bool(self.run.grid)}
        del run["is_reference"]
        decides = {**asdict(self), "run": run, "format": FORMAT, "versions": _versions()}
        if self.protocol is not None:
            wanted = () if self.run.has_bench else (self.part,)
            evaluate = [of for of in self.protocol.evaluate if of[0] in wanted]
            decides["protocol"] = {**asdict(self.protocol), "evaluate": evaluate}
        optional = [*((run, name) for name in _OPTIONAL), (decides["measures"], "contamination")]
        for values, name in (*optional, (decides, "world_sha256"), (decides, "protocol")):
            if not values[name]:  # which is as if there were none
                del values[name]
        return f"{self.run.name}-{content_hash(decides)[:16]}"

    @property
    def training_key(self) -> str:
        """Key of the trained model (with a protocol). Cells that differ in their evaluations only share it."""
        run = asdict(replace(self.run, label="", is_tuned=True, is_reference=False))
        decides = {
            "run": {name: value for name, value in run.items() if value or name not in ("grid", "tampering", "method")},
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "data": (self.measures.n_examples, self.measures.contamination),
            "launch": self.protocol and (self.protocol.launch, self.protocol.launch_sha256),
            "versions": _versions(),
        }
        return f"{self.run.name}-{content_hash(decides)[:16]}"

    def to_json(self) -> dict[str, Any]:
        """Return what its result says of it."""
        return {"run": self.run.name, "seed": self.seed, "part": self.part, "learning_rate": self.learning_rate}

    @property
    def training_options(self) -> list[str]:
        """Options of the recipe besides those of the run."""
        options = ["--seed", str(self.seed)]
        if self.learning_rate is not None and not self.run.grid:
            options += ["--learning_rate", str(self.learning_rate)]
        if self.measures.n_examples is not None:
            options += ["--max_train_examples", str(self.measures.n_examples)]
        if self.measures.contamination:
            options += ["--contamination", str(self.measures.contamination)]
        return options

    @property
    def name(self) -> str:
        """Name on a command line. Test cells have no learning rate in it: it is chosen after validation."""
        rate = f"/{self.learning_rate:g}" if self.part == "validation" else ""
        return f"{self.part}/{self.run.name}{rate}/{self.seed}"


@dataclass(frozen=True)
class Measures:
    """Sizes of the training and the evaluation; the same for all methods."""

    n_examples: int | None = 128
    """Harmful training examples; on the testbed as many harmless ones, else the recipe's share. None: all."""
    n_prompts: int = 256
    """Prompts of each of the four sets of a part."""
    n_attacked: int = 8
    """Harmful prompts for GCG, half of them of held-out categories (test part only); 0: none."""
    n_capability: int = 50
    """Items of each lm-eval task of the testbed (test part only); 0: none."""
    relearning: bool = True
    """Whether safety is measured again after further training (test part only)."""
    contamination: float = 0.0
    """Share of harmful training examples with wrong labels."""


RUNS: Mapping[str, Run] = {
    run.name: run
    for run in (
        Run("base", "base", "none", is_tuned=False, is_reference=True),
        Run("sft-lora", "SFT-LoRA", "sft", ("--init", "default")),
        Run("sft-sails", "SFT-SAILS", "sft", ("--init", "sails")),
        Run("sft-full", "SFT-full", "sft", ("--use_peft", "false")),
        Run("dpo-lora", "DPO-LoRA", "dpo", ("--init", "default")),
        Run("dpo-sails", "DPO-SAILS", "dpo", ("--init", "sails")),
        Run("dpo-full", "DPO-full", "dpo", ("--use_peft", "false")),
        Run("rlhf", "RLHF reference", "rlhf", ("--max_steps", "120"), is_tuned=False, is_reference=True),
    )
}
"""The default comparison. There is one RLHF reference, because it takes as long as seven others; its learning rate was
chosen on the validation part (docs/rlhf.md)."""


@dataclass(frozen=True)
class Plan:
    """A comparison."""

    runs: tuple[Run, ...] = tuple(RUNS.values())
    learning_rates: tuple[float, ...] = LEARNING_RATES
    n_extensions: int = 2
    """How many learning rates may be added to the grid of a run whose best one is at an end of it, and how many tuning
    seeds to a run whose seeds disagree."""
    n_seeds: int = 5
    n_tuning_seeds: int = 1
    first_seed: int = 0
    n_attacked_seeds: int = 5
    """How many of the first seeds GCG is tried on: it takes as long as everything else."""
    world: str = "testbed"
    measures: Measures = field(default_factory=Measures)
    protocol: Protocol | None = None
    world_sha256: str = ""
    """Hash of the world, if it is a folder."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError(f"no runs to compare; choose among {', '.join(RUNS)}")
        names = [run.name for run in self.runs]
        if len(set(names)) < len(names):
            raise InputError(f"a run is named twice ({', '.join(sorted(names))}); name each once")
        if not self.learning_rates or not all(0 < rate < 1 for rate in self.learning_rates):
            raise InputError(f"learning rates are {self.learning_rates}; give numbers between 0 and 1")
        check_least(self, n_seeds=1, n_tuning_seeds=1, n_extensions=0)
        tuned = next((run.name for run in self.runs if run.is_tuned and not run.has_bench), None)
        if self.protocol is not None and tuned is not None and not self.protocol.of_part("validation"):
            raise InputError(
                f"the run {tuned} is tuned, but evaluate has no `validation` to choose its learning rate by; add one, "
                "or give each run `tuned: false` and, in `options`, its learning rate"
            )
        if not 0 <= self.first_seed <= FIRST_TUNING_SEED - self.n_seeds:
            raise InputError(f"first_seed is {self.first_seed}; choose 0 to {FIRST_TUNING_SEED - self.n_seeds}")

    @property
    def seeds(self) -> range:
        """The reported seeds."""
        return range(self.first_seed, self.first_seed + self.n_seeds)

    def tuning_cells(self, results: CellResults | None = None) -> list[Cell]:
        """Return the cells of the validation part: every learning rate of every tuned run.

        With results also those of the rates that the results call for (see `grid`); with theirs it may be more.
        """
        cells = []
        for run in (run for run in self.runs if run.is_tuned):
            n_seeds = self.tuning_seeds_of(run, results or {})
            for rate in self.grid(run, results or {}, n_seeds):
                cells += self._tuning_cells(run, rate, n_seeds)
        return cells

    def _tuning_cells(self, run: Run, rate: float, n_seeds: int) -> list[Cell]:
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + n_seeds)
        measures = replace(self.measures, n_attacked=0, n_capability=0, relearning=False)  # of the test part only
        return [self._cell(run, rate, seed, "validation", measures) for seed in seeds]

    def _cell(self, run: Run, rate: float | None, seed: int, part: Part, measures: Measures) -> Cell:
        return Cell(run, rate, seed, part, self.world, measures, self.protocol, self.world_sha256)

    def tuning_seeds_of(self, run: Run, results: CellResults) -> int:
        """Return the number of a run's tuning seeds: those of the plan, and more as long as they disagree."""
        if run.grid:
            return self.n_tuning_seeds
        for n_seeds in range(self.n_tuning_seeds, self.n_tuning_seeds + self.n_extensions):
            rates = self.grid(run, results, n_seeds)
            tuning = self._tuning(run, rates, results, n_seeds)
            if tuning is None or len(tuning.merits) < len(rates) or not tuning.disagrees:
                return n_seeds
        return self.n_tuning_seeds + self.n_extensions

    def grid(self, run: Run, results: CellResults, n_seeds: int) -> tuple[float, ...]:
        """Return a run's learning rates: the grid, then those added because the best one was at an end of it.

        Args:
            run: the run.
            results: of tuning cells.
            n_seeds: tuning seeds that count.
        """
        if run.grid:
            return run.grid
        rates = self.learning_rates
        for _ in range(self.n_extensions):
            tuning = self._tuning(run, rates, results, n_seeds)
            beyond = beyond_end(tuning.merits) if tuning is not None and len(tuning.merits) == len(rates) else None
            if beyond is None:
                break
            rates = (*rates, beyond)
        return rates

    def _tuning(self, run: Run, rates: Sequence[float], results: CellResults, n_seeds: int) -> Tuning | None:
        """Return the merits of the rates that have results of all tuning seeds; None if there is no such rate."""
        by_seed: dict[int, dict[float, float]] = {}
        for rate in rates:
            cells = self._tuning_cells(run, rate, n_seeds)
            for cell in cells if all(cell.key in results for cell in cells) else ():
                result = at_worst(results[cell.key])
                by_seed.setdefault(cell.seed, {})[rate] = kept(result) if run.tampering else merit(result)
        n_added = 0 if run.grid else len(rates) - len(self.learning_rates)
        return Tuning(by_seed, n_added, knob=bool(run.grid)) if by_seed else None

    def test_cells(self, chosen: Mapping[str, float]) -> list[Cell]:
        """Return the cells of the test part: every seed of every run, at its chosen learning rate (by run name)."""
        spared = replace(self.measures, n_attacked=0)
        return [
            self._cell(
                run,
                chosen.get(run.name),
                seed,
                "test",
                self.measures if seed < self.first_seed + self.n_attacked_seeds else spared,
            )
            for seed in self.seeds
            for run in self.runs
            if not run.is_reference or seed == self.first_seed
        ]

    def tuning(self, results: CellResults) -> dict[str, Tuning]:
        """Return how the learning rate of each run is chosen by the results that are there."""
        found = {}
        for run in (run for run in self.runs if run.is_tuned):
            n_seeds = self.tuning_seeds_of(run, results)
            tuning = self._tuning(run, self.grid(run, results, n_seeds), results, n_seeds)
            if tuning is not None:
                found[run.name] = tuning
        return found

    def choose(self, results: CellResults) -> dict[str, float]:
        """Return the learning rate with the highest mean merit of each run, from the results of all tuning cells."""
        return {name: tuning.chosen for name, tuning in self.tuning(results).items()}


def option_groups(options: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return options with their values, in order; of an option given twice, the last values."""
    groups: dict[str, tuple[str, ...]] = {}
    name = ""
    for word in options:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            groups[name] = (value,) if equals else ()
        else:
            groups[name] = (*groups.get(name, ()), word)
    return groups


def option_words(groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return options with their values as words of a command line."""
    return tuple(word for name, values in groups.items() for word in (name, *values))
