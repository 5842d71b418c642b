"""Define the options of `sails compare`, `sails report` and `recipes/reproduce.py`."""

from dataclasses import dataclass, field
from typing import Any

from sails_align.core.errors import InputError
from sails_align.core.options import OVERWRITE, check_choice, check_least, option
from sails_align.core.trackers import REPORT_TO, services_of

STUDIES = ("main", "ablations", "tampering", "methods")
KEYS = ("model", "runs", "launch", "evaluate", "in_distribution", "out_of_distribution")
"""Entries of the file of a comparison besides the options of `sails compare`."""
LAUNCHERS = ("local", "slurm", "submitit-local")
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
OF_TESTBED = ("world", "n_prompts", "n_attacked", "n_attacked_seeds", "n_capability", "relearning")
"""Options that only the testbed has; for other models the file's `evaluate` takes their place."""


NOT_IN_IDENTITY = ("list_cells", "cell", "processes", "output_dir", "overwrite_output_dir", "progress", "report_to")
"""Options of comparisons with the same results; worlds that are folders count by their content."""


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, and on what."""

    runs: list[str] | None = option(
        None,
        "Runs to compare: some of base, sft-lora, sft-sails, sft-full, dpo-lora, dpo-sails, dpo-full, rlhf, or of "
        "those that the file names; default: all.",
    )
    n_seeds: int = option(5, "Seeds of initialization and data that are reported.")
    first_seed: int = option(0, "First reported seed.")
    n_tuning_seeds: int = option(1, "Number of further seeds, used only to choose hyperparameters.")
    learning_rates: list[float] = option(
        list(LEARNING_RATES),
        "Grid of learning rates, the same for all methods; the default is for the testbed's small model.",
    )
    n_extensions: int = option(
        2,
        "Learning rates that may be added to the grid of a method whose best one is at an end of it, and tuning seeds "
        "that may be added to a method whose tuning seeds disagree.",
    )
    world: str = option("testbed", "World: testbed, testbed:N, testbed:shared_harm=0, or a folder.")
    n_examples: int | None = option(
        None,
        "Number of harmful training examples; default: 128 (other models: all). On the testbed as many harmless ones, "
        "else the recipe's share.",
    )
    n_prompts: int = option(256, "On the testbed: number of test prompts in each of the four sets.")
    n_attacked: int = option(8, "On the testbed: number of harmful prompts for GCG, half of them of each set; 0: none.")
    n_attacked_seeds: int = option(5, "On the testbed: how many of the seeds GCG is tried on.")
    n_capability: int = option(50, "On the testbed: number of items of each of its lm-eval tasks; 0: none.")
    relearning: bool = option(
        True, "On the testbed: also measure the remaining safety after training on harmless or harmful data."
    )
    study: list[str] = option(
        ["main"],
        "What to study, one or several: main (every method), ablations (each setting of SAILS changed, one at a time), "
        "tampering (what safety is left after further training, with and without defences), methods (the other methods "
        "that align a model).",
    )
    ablations: list[str] | None = option(
        None, "For --study ablations: names of ablations (`sails list ablations` lists them); default: all."
    )
    attacks: list[str] = option(
        ["task", "benign", "harmful", "poison-10"],
        "For --study tampering: attacks (task, facts, benign, harmful, poison-5, poison-10 or poison-20, also with "
        "-lora at the end; ablate, gcg, prefill-1, prefill-3 or prefill-5).",
    )
    defences: list[str] | None = option(
        None, "For --study tampering: methods and controls (`sails list defences` lists them); default: all."
    )
    tampered: list[str] = option(["sft-sails"], "For --study tampering: names of the runs that are attacked.")
    methods: list[str] | None = option(
        None, "For --study methods: names of methods (`sails list methods` lists them); default: all."
    )
    examples: list[int] = option([], "Also train on these numbers of examples (learning curves).")
    worlds: list[str] = option(
        [],
        "Also compare, over n_seeds, in these worlds: testbed:N, folders, or parameters such as shared_harm=0 or "
        "contamination=0.1 (docs/comparison.md).",
    )
    n_side_seeds: int = option(5, "Number of seeds of the ablations and of --examples.")
    list_cells: bool = option(
        False, "Print the names of all cells and exit. A cell is one training with its evaluation."
    )
    cell: list[str] | None = option(
        None,
        "Compute only the cells with these names, or of a pattern such as 'validation/*', and write no report; for "
        "jobs on several machines.",
    )
    processes: int | None = option(None, "Number of parallel trainings; default: one per GPU, or per core.")
    output_dir: str = option("runs/compare", "Output folder for results and report.")
    overwrite_output_dir: bool = option(False, OVERWRITE)
    progress: bool = option(True, "Show progress bars.")
    report_to: list[str] = option([], REPORT_TO)

    def __post_init__(self) -> None:
        services_of(self.report_to)
        check_least(self, n_examples=1, n_prompts=1, processes=1, n_side_seeds=1)
        check_least(self, n_attacked=0, n_capability=0, n_attacked_seeds=0)
        if self.n_attacked % 2:
            raise InputError(f"n_attacked is {self.n_attacked}, but half of them are of each set; give an even one")
        given = [name for name in ("ablations", "defences", "methods") if getattr(self, name) is not None]
        for name in ("worlds", "examples", "learning_rates", "study", "attacks", "tampered", *given):
            if not isinstance(getattr(self, name), list):
                raise InputError(f"{name} is {getattr(self, name)!r}, but it must be a list; correct it")
        for name in self.study:
            check_choice("study", name, STUDIES)
        if len(set(map(str, self.worlds))) < len(self.worlds):
            raise InputError(f"worlds names one twice ({', '.join(self.worlds)}); give each once")
        if any(number < 1 for number in self.examples):
            raise InputError(f"examples are {self.examples}; choose 1 or more")


@dataclass(frozen=True)
class ReportOptions:
    """The comparison to report."""

    output_dir: str = option("runs/compare", "Output folder of `sails compare`.")


@dataclass(frozen=True)
class LauncherOptions:
    """Where trainings and evaluations run."""

    launcher: str = option(
        "local",
        "local: processes on this machine; slurm: jobs in a cluster's queue; submitit-local: like slurm, but on this "
        "machine, to try it out.",
    )
    slurm_partition: str | None = option(None, "Partition of the cluster.")
    slurm_account: str | None = option(None, "Account that is charged.")
    slurm_qos: str | None = option(None, "Quality of service.")
    slurm_time: int = option(240, "Time limit of a job in minutes. A longer job is queued again.")
    slurm_gpus: int = option(1, "GPUs of a job of `sails compare`; 0: none.")
    slurm_cpus: int = option(4, "Cores of a job.")
    slurm_mem_gb: int | None = option(None, "Memory of a job; default: the cluster's.")
    slurm_max_jobs: int | None = option(None, "Jobs in the queue at a time; default: all.")
    slurm_options: list[str] = option([], "Other options of sbatch, such as constraint=h100 nice=100.")
    slurm_setup: list[str] = option([], "Shell commands before each job, such as 'module load cuda'.")

    def __post_init__(self) -> None:
        check_choice("launcher", self.launcher, LAUNCHERS)
        check_least(self, slurm_time=1, slurm_gpus=0, slurm_cpus=1, slurm_mem_gb=1, slurm_max_jobs=1)
        if wrong := [words for words in self.slurm_options if not all(words.partition("="))]:
            raise InputError(f"slurm_options has {wrong[0]!r}; give NAME=VALUE, such as constraint=h100")

    def parameters(self) -> dict[str, Any]:
        """Return the options for `submitit.AutoExecutor.update_parameters`."""
        more = dict(words.split("=", 1) for words in self.slurm_options)
        return {
            "timeout_min": self.slurm_time,
            "cpus_per_task": self.slurm_cpus,
            "mem_gb": self.slurm_mem_gb,
            "slurm_partition": self.slurm_partition,
            "slurm_account": self.slurm_account,
            "slurm_qos": self.slurm_qos,
            "slurm_additional_parameters": more or None,
            "slurm_setup": self.slurm_setup or None,
        }


@dataclass(frozen=True)
class ReproduceOptions:
    """What is reproduced, and the machine it is planned for."""

    model: str = field(
        metadata={"help": "A folder of recipes/configs (gemma-2-9b), or a file like their compare.yaml."}
    )
    dry_run: bool = option(False, "Show the plan and check what it needs, and run nothing.")
    num_gpus: int = option(8, "GPUs of this machine; 0: its CPUs, to try things out.")
    gpu_memory_gib: float = option(80.0, "Memory of a GPU in GiB.")
    tflops: float = option(300.0, "10^12 operations a second that a GPU reaches.")
    steps: list[str] = option([], "Only steps whose names begin so, such as train/sft-sails evaluate; default: all.")
    skip_checks: bool = option(False, "Go on without the checks.")
    output_dir: str | None = option(None, "Output folder; default: runs/reproduce-<model>.")
    overwrite_output_dir: bool = option(False, OVERWRITE)

    def __post_init__(self) -> None:
        check_least(self, num_gpus=0, gpu_memory_gib=1, tflops=1)
