"""The options of `sails compare`, `sails report` and `recipes/reproduce.py`."""

from dataclasses import dataclass, field
from typing import Any

from sails_align.core.errors import InputError
from sails_align.core.options import check_choice, check_least

LAUNCHERS = ("local", "slurm", "submitit-local")
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
OF_TESTBED = ("world", "n_prompts", "n_attacked", "n_attacked_seeds", "n_capability", "relearning")
"""Options that only the testbed has: for other models `evaluate` in the file says how they are evaluated."""


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, and on what."""

    runs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Runs to compare: some of base, sft-lora, sft-sails, sft-full, dpo-lora, dpo-sails, dpo-full, "
            "rlhf, or of those that the file names; default: all."
        },
    )
    n_seeds: int = field(default=5, metadata={"help": "Seeds of initialization and data that are reported."})
    first_seed: int = field(default=0, metadata={"help": "First reported seed."})
    n_tuning_seeds: int = field(default=1, metadata={"help": "Number of other seeds, used to choose learning rates."})
    learning_rates: list[float] = field(
        default_factory=lambda: list(LEARNING_RATES),
        metadata={"help": "Grid of learning rates, the same for all methods."},
    )
    world: str = field(
        default="testbed", metadata={"help": "World: testbed, testbed:N, testbed:shared_harm=0, or a folder."}
    )
    n_examples: int | None = field(
        default=None,
        metadata={
            "help": "Number of harmful training examples, and of harmless ones; default: 128 (other models: all)."
        },
    )
    n_prompts: int = field(default=256, metadata={"help": "Number of test prompts in each of the four sets."})
    n_attacked: int = field(default=8, metadata={"help": "Number of harmful prompts for GCG; 0: none."})
    n_attacked_seeds: int = field(default=5, metadata={"help": "How many of the seeds GCG is tried on."})
    n_capability: int = field(
        default=50, metadata={"help": "Number of items of each lm-eval task of the testbed; 0: none."}
    )
    relearning: bool = field(
        default=True,
        metadata={"help": "Also measure the remaining safety after further training on harmless or harmful data."},
    )
    ablations: bool = field(default=False, metadata={"help": "Also change each setting of the method, one at a time."})
    examples: list[int] = field(
        default_factory=list,
        metadata={"help": "Also train on these numbers of examples (learning curves)."},
    )
    worlds: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Also compare, over n_seeds, in these worlds: testbed:N, folders, or parameters such as "
            "shared_harm=0 or contamination=0.1 (docs/comparison.md)."
        },
    )
    n_side_seeds: int = field(default=5, metadata={"help": "Number of seeds of the ablations and of --examples."})
    list_cells: bool = field(default=False, metadata={"help": "Print the names of all cells and exit."})
    cell: list[str] | None = field(
        default=None, metadata={"help": "Compute only these cells and write no report, for jobs on several machines."}
    )
    processes: int | None = field(
        default=None, metadata={"help": "Number of parallel trainings; default: one per GPU, or per core."}
    )
    output_dir: str = field(default="runs/compare", metadata={"help": "Output folder for results and report."})
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
        for name in ("worlds", "examples", "learning_rates"):
            if not isinstance(getattr(self, name), list):
                raise InputError(f"{name} is {getattr(self, name)!r}, but it must be a list; correct it")
        if len(set(map(str, self.worlds))) < len(self.worlds):
            raise InputError(f"worlds names one twice ({', '.join(self.worlds)}); give each once")
        if any(number < 1 for number in self.examples):
            raise InputError(f"examples are {self.examples}; choose 1 or more")


@dataclass(frozen=True)
class ReportOptions:
    """Of which comparison a report is made."""

    output_dir: str = field(default="runs/compare", metadata={"help": "Output folder of `sails compare`."})


@dataclass(frozen=True)
class LauncherOptions:
    """Where trainings and evaluations are done."""

    launcher: str = field(
        default="local",
        metadata={
            "help": "local: processes on this machine; slurm: jobs of a cluster's queue, which are waited for; "
            "submitit-local: as slurm, but on this machine, to try it out."
        },
    )
    slurm_partition: str | None = field(default=None, metadata={"help": "Partition of the cluster."})
    slurm_account: str | None = field(default=None, metadata={"help": "Account that is charged."})
    slurm_qos: str | None = field(default=None, metadata={"help": "Quality of service."})
    slurm_time: int = field(
        default=240, metadata={"help": "Time limit of a job in minutes. A longer job is queued again."}
    )
    slurm_gpus: int = field(default=1, metadata={"help": "GPUs of a job of `sails compare`; 0: none."})
    slurm_cpus: int = field(default=4, metadata={"help": "Cores of a job."})
    slurm_mem_gb: int | None = field(default=None, metadata={"help": "Memory of a job; default: the cluster's."})
    slurm_max_jobs: int | None = field(default=None, metadata={"help": "Jobs in the queue at a time; default: all."})
    slurm_options: list[str] = field(
        default_factory=list, metadata={"help": "Other options of sbatch, such as constraint=h100 nice=100."}
    )
    slurm_setup: list[str] = field(
        default_factory=list, metadata={"help": "Shell commands before each job, such as 'module load cuda'."}
    )

    def __post_init__(self) -> None:
        check_choice("launcher", self.launcher, LAUNCHERS)
        check_least(self, slurm_time=1, slurm_gpus=0, slurm_cpus=1, slurm_mem_gb=1, slurm_max_jobs=1)
        if wrong := [option for option in self.slurm_options if not all(option.partition("="))]:
            raise InputError(f"slurm_options has {wrong[0]!r}; give NAME=VALUE, such as constraint=h100")

    def parameters(self) -> dict[str, Any]:
        """The options as `submitit.AutoExecutor.update_parameters` takes them."""
        more = dict(option.split("=", 1) for option in self.slurm_options)
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
    """What is reproduced, and for which machine it is planned."""

    model: str = field(
        metadata={"help": "A folder of recipes/configs (gemma-2-9b), or a file like their compare.yaml."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Show the plan and check what it needs, and run nothing."})
    num_gpus: int = field(default=8, metadata={"help": "GPUs of this machine; 0: its CPUs, to try things out."})
    gpu_memory_gib: float = field(default=80.0, metadata={"help": "Memory of a GPU in GiB."})
    tflops: float = field(default=300.0, metadata={"help": "10^12 operations a second that a GPU reaches."})
    steps: list[str] = field(
        default_factory=list,
        metadata={"help": "Only those whose names begin so, such as train/sft-sails evaluate; default: all."},
    )
    skip_checks: bool = field(default=False, metadata={"help": "Go on without the checks."})
    output_dir: str | None = field(default=None, metadata={"help": "Default: runs/reproduce-<model>."})

    def __post_init__(self) -> None:
        check_least(self, num_gpus=0, gpu_memory_gib=1, tflops=1)
