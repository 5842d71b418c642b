"""The options of `sails compare`, and the plans that they mean."""

from dataclasses import dataclass, field
from typing import Any

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.options import check_least
from sails_align.experiments.plan import LEARNING_RATES, RUNS, Measures, Plan, Protocol, Run, runs_named
from sails_align.experiments.protocol import KEYS, read_protocol
from sails_align.experiments.studies import Study, ablations, examples, worlds
from sails_align.testbed.build import is_testbed

OF_TESTBED = ("world", "n_prompts", "n_attacked", "n_attacked_seeds", "n_capability", "relearning")
"""Options that say nothing about other models: a file's `evaluate` does."""


@dataclass
class CompareArguments:
    """What is compared, and on what."""

    runs: list[str] | None = field(
        default=None, metadata={"help": f"Of {', '.join(RUNS)}, or of those that the file names; default: all."}
    )
    n_seeds: int = field(default=5, metadata={"help": "Seeds of initialisation and data that are reported."})
    first_seed: int = field(default=0, metadata={"help": "The first of them."})
    n_tuning_seeds: int = field(default=1, metadata={"help": "Other seeds, that learning rates are chosen with."})
    learning_rates: list[float] = field(
        default_factory=lambda: list(LEARNING_RATES), metadata={"help": "The grid, the same for all methods."}
    )
    world: str = field(default="testbed", metadata={"help": "testbed, testbed:N, testbed:shared_harm=0, or a folder."})
    n_examples: int | None = field(
        default=None,
        metadata={"help": "Harmful training examples, and as many harmless ones; default: 128; of other models all."},
    )
    n_prompts: int = field(default=256, metadata={"help": "Test prompts in each of the four sets."})
    n_attacked: int = field(default=8, metadata={"help": "Harmful prompts that GCG is tried on; 0: none."})
    n_attacked_seeds: int = field(default=5, metadata={"help": "Of the seeds, that GCG is tried on."})
    n_capability: int = field(default=50, metadata={"help": "Items of each lm-eval task of the testbed; 0: none."})
    relearning: bool = field(
        default=True, metadata={"help": "Also measure what safety is left after training on harmless or harmful data."}
    )
    ablations: bool = field(default=False, metadata={"help": "Also change each part of the method, one at a time."})
    examples: list[int] = field(
        default_factory=list,
        metadata={"help": "Also train on these numbers of examples: how many does each method need?"},
    )
    worlds: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Also compare, over n_seeds, in these worlds: testbed:N, folders, or parameters such as "
            "shared_harm=0 or contamination=0.1 (docs/comparison.md)."
        },
    )
    n_side_seeds: int = field(default=5, metadata={"help": "Seeds of the ablations and of --examples."})
    list_cells: bool = field(default=False, metadata={"help": "Print the names of all cells, and do nothing."})
    cell: list[str] | None = field(
        default=None, metadata={"help": "Compute these cells alone, and make no report: for jobs on several machines."}
    )
    processes: int | None = field(
        default=None, metadata={"help": "Trainings at a time; default: one for each GPU, or for each core."}
    )
    output_dir: str = field(default="runs/compare", metadata={"help": "Results, and the report."})
    progress: bool = field(default=True, metadata={"help": "Show progress bars."})

    def __post_init__(self) -> None:
        check_least(
            self,
            n_examples=1,
            n_prompts=1,
            n_attacked=0,
            n_capability=0,
            processes=1,
            n_side_seeds=1,
            n_attacked_seeds=0,
        )
        if not is_testbed(self.world):
            raise InputError(
                f"world is {self.world!r}; give testbed, testbed:N or a testbed's folder;\n"
                "other models are compared by --config (docs/comparison.md)"
            )
        for name in ("worlds", "examples", "learning_rates"):
            if not isinstance(getattr(self, name), list):
                raise InputError(f"{name} is {getattr(self, name)!r}, but it must be a list; correct it")
        if len(set(map(str, self.worlds))) < len(self.worlds):
            raise InputError(f"worlds names one twice ({', '.join(self.worlds)}); give each once")
        if any(number < 1 for number in self.examples):
            raise InputError(f"examples are {self.examples}; choose 1 or more")

    def studies(self, defined: tuple[tuple[Run, ...], Protocol] | None = None) -> list[Study]:
        """The comparison that the options name, first, and what is asked besides.

        Args:
            defined: runs and protocol of models that are no testbed.
        """
        runs, protocol = defined or (tuple(RUNS.values()), None)
        world = self.world if protocol is None else protocol.model
        plan = Plan(
            runs=runs if self.runs is None else tuple(runs_named(self.runs, runs)),
            learning_rates=tuple(self.learning_rates),
            n_seeds=self.n_seeds,
            n_tuning_seeds=self.n_tuning_seeds,
            first_seed=self.first_seed,
            n_attacked_seeds=self.n_attacked_seeds,
            world=world,
            measures=self._measures() if protocol is None else Measures(self.n_examples, 0, 0, 0, relearning=False),
            protocol=protocol,
        )
        found = [Study("main", ((world, plan),))]
        if self.ablations:
            found.append(ablations(plan, self.n_side_seeds))
        if self.examples:
            found.append(examples(plan, self.examples, self.n_side_seeds))
        if self.worlds:
            found.append(worlds(plan, self.worlds))
        return found

    def _measures(self) -> Measures:
        """What is measured on the testbed."""
        n_examples = 128 if self.n_examples is None else self.n_examples
        return Measures(n_examples, self.n_prompts, self.n_attacked, self.n_capability, relearning=self.relearning)


def read_plans(line: CommandLine, prog: str | None) -> tuple[CompareArguments, list[Study]]:
    """The options, and what they mean.

    Raises:
        InputError: for options that cannot be used, and for a file that is not understood.
    """
    is_of_models = isinstance(line.from_file.get("runs"), dict) or "evaluate" in line.from_file
    if not is_of_models:
        (args,) = line.parse([CompareArguments], prog=prog)
        return args, args.studies()
    of_file: dict[str, Any] = {name: value for name, value in line.from_file.items() if name in KEYS}
    options = {name: value for name, value in line.from_file.items() if name not in KEYS}
    line = CommandLine(line.options, line.path, options)
    (args,) = line.parse([CompareArguments], prog=prog)
    for name in OF_TESTBED:
        if name in line.given:
            raise InputError(f"{name} is of the testbed; in {line.path} `evaluate` says how models are evaluated")
    return args, args.studies(read_protocol(str(line.path), of_file))
