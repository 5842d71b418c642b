"""Plan the paper's reproduction on a model: its commands as jobs, which `recipes/reproduce.py` runs.

Runs and evaluations are those of a comparison's file (`recipes/configs/<model>/compare.yaml`). Here each run is trained
once, at its recipe's own learning rate.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedConfig

from sails_align.core.errors import InputError
from sails_align.core.machine import GIB
from sails_align.evaluation.options import PromptArguments
from sails_align.experiments.commands import AGAIN, REPLACING, evaluation, options_of
from sails_align.experiments.contents import contents_hash
from sails_align.experiments.jobs import Gpus, Job
from sails_align.experiments.limits import known_config
from sails_align.experiments.plan import Evaluation, Protocol, Run, option_groups
from sails_align.subspace.options import Method
from sails_align.testbed.build import is_testbed
from sails_align.training import run as align
from sails_align.training.estimate import as_on_gpu, fits
from sails_align.training.memory import WHOLE_WEIGHTS, Engine, Memory, estimate
from sails_align.training.plan import TrainingPlan
from sails_align.training.shapes import meta_model, setup_of, shape_of

LAUNCH: dict[Engine, str] = {
    "single": "single_gpu.yaml",
    "ddp": "multi_gpu.yaml",
    "zero2": "zero2.yaml",
    "zero3": "zero3.yaml",
    "zero3_offload": "zero3_offload.yaml",
}
"""Files in `accelerate_configs`."""
RECIPE_GPUS = 8
"""GPUs that the recipes' batch sizes are for."""
GCG = ("--prompts", "advbench", "--n_prompts", "50")
"""Our choice: the paper's number of attacked prompts is unknown."""
SHARED = ("--dtype", "--revision", "--trust_remote_code", "--system_prompt", "--guard_family")
"""Options that attacks share with the evaluation of safety, besides those of the judge."""
DATA = "Anthropic/hh-rlhf"
DATA_FOLDER = "data/hh-rlhf"


@dataclass(frozen=True)
class Fit:
    """The engine of a training."""

    engine: Engine
    memory: Memory
    is_enough: bool
    """Whether the training fits."""


@dataclass(frozen=True)
class Reproduction:
    """What is reproduced, and on which machine.

    Steps are jobs named `<stage>/<run>` or `<stage>/<run>/<evaluation>`.
    """

    runs: tuple[Run, ...]
    protocol: Protocol
    output_dir: Path
    num_gpus: int
    """0: this machine's CPUs, in one process."""
    gpu_memory_gib: float = 80.0
    config: PreTrainedConfig | None = None
    """The model's; without it memory and costs are unknown."""
    only: tuple[str, ...] = ()
    """Beginnings of the names of the wanted steps; empty: all steps."""
    overwrite: bool = False
    """Whether trainings and discovery replace what others left in their folders."""

    def folder(self, run: Run) -> str:
        """Return the model of a run: its folder, or its name."""
        return run.options[1] if run.trainer == "none" else str(self.output_dir / run.name)

    def jobs(self) -> list[Job]:
        """Return the wanted steps in an order in which they can be run.

        Raises `InputError` if the runs need different subspaces.
        """
        jobs = [*self._data(), *self._discovery(), *self._trainings(), *self._evaluations(), *self._attacks()]
        for place, job in enumerate(jobs):
            if job.name.startswith(("discover", "train")):
                outdated = {other.name for other in jobs if job.name in other.after}
                trained = [name.split("/")[1] for name in (job.name, *outdated) if name.startswith("train/")]
                # Also evaluations that are not in the file now: they may have been, and may be again.
                outdated |= {f"evaluate/{run}/{kind}" for run in trained for kind in get_args(Evaluation)}
                jobs[place] = replace(job, outdates=tuple(map(self._done, sorted(outdated))))
        return [job for job in jobs if not self.only or job.name.startswith(self.only)]

    def job(self, name: str, command: Sequence[str], gpus: Gpus, after: Sequence[str] = ()) -> Job:
        """Return a step: its command as it is typed in the repository's folder, and a file in `done/`."""
        options = option_groups(command)
        parts = ("discovered", "evaluated", *(run.name for run in self.runs))
        made = (Path(DATA_FOLDER), *(self.output_dir / part for part in parts))
        return Job(
            name=name,
            work=tuple(command),
            result=self._done(name),
            log=self.output_dir / "logs" / f"{name.replace('/', '.')}.log",
            record={"argv": list(command), "files": contents_hash(command, made)},
            folder=Path(*options.get("--output_dir", options.get("--local-dir", ()))),
            gpus=gpus,
            after=tuple(after),
            keeps_log=True,
            also=REPLACING if self._replaces(name) else (),
        )

    def _replaces(self, name: str) -> bool:
        """Return whether a step replaces what its folder holds: measurements of another model, always."""
        return name.startswith(("evaluate", "attack")) or (self.overwrite and not name.startswith("data"))

    def _done(self, name: str) -> Path:
        return self.output_dir / "done" / f"{name.replace('/', '.')}.json"

    @property
    def n_gpus(self) -> dict[Gpus, int]:
        """GPUs of a job on a cluster, by what it needs."""
        one = min(1, self.num_gpus)
        return {"none": 0, "one": one, "share": one, "all": self.num_gpus}

    @cached_property
    def arguments(self) -> dict[str, TrainingPlan]:
        """Options of each training on the planned machine."""
        return {
            run.name: align.parse(run.trainer, as_on_gpu(run.options) if self.num_gpus else list(run.options))  # pyright: ignore[reportArgumentType]
            for run in self.runs
            if run.trainer in get_args(Method)
        }

    @cached_property
    def fits(self) -> dict[str, Fit]:
        """What each training needs of the GPUs; empty without GPUs or the model's configuration."""
        if self.config is None or not self.num_gpus:
            return {}
        return {
            name: fitting_engine(args, self.config, self.num_gpus, self.gpu_memory_gib)
            for name, args in self.arguments.items()
        }

    @property
    def engines(self) -> dict[str, Engine]:
        """Engine of each training; a likely one if what it needs is unknown."""
        likely: Engine = "single" if self.num_gpus < 2 else "zero2"
        return {name: self.fits[name].engine if self.fits else likely for name in self.arguments}

    @property
    def wanted_fits(self) -> dict[str, Fit]:
        """What each training among the wanted steps needs."""
        wanted = {job.name for job in self.jobs()}
        return {name: fit for name, fit in self.fits.items() if f"train/{name}" in wanted}

    @property
    def memory_gib(self) -> float:
        """Memory of the machine that the largest wanted training needs; 0 if unknown."""
        return max((fit.memory.cpu / GIB for fit in self.wanted_fits.values()), default=0.0)

    @property
    def model(self) -> str:
        """The base model: what is trained."""
        return str(next(iter(self.arguments.values())).model.model_name_or_path)

    def config_of(self, model: str) -> PreTrainedConfig | None:
        """Return the configuration of a model; None if it is not known."""
        return self.config if model == self.model else known_config(model)

    @property
    def hub_models(self) -> list[str]:
        """The models from the hub: the base, and those that are evaluated as they are."""
        models = dict.fromkeys([self.model, *(run.options[1] for run in self.runs if run.trainer == "none")])
        return [model for model in models if not Path(model).exists() and not is_testbed(model)]

    @property
    def downloads(self) -> dict[str, str]:
        """The models from the hub, by the names of the steps that download them."""
        return {f"data/{model.replace('/', '--')}": model for model in self.hub_models}

    def _data(self) -> Iterator[Job]:
        named = [(args.script.dataset_name, args.data.helpful_dataset_name) for args in self.arguments.values()]
        names = {name for pair in named for name in pair}
        parts = sorted(Path(name).name for name in names if name is not None and is_hh_rlhf(name))
        if parts:
            command = ("hf", "download", DATA, "--repo-type", "dataset", "--local-dir", DATA_FOLDER)
            yield self.job("data/hh-rlhf", (*command, *_included(f"{part}/*" for part in parts)), "none")
        for name, model in self.downloads.items():
            wanted = _included(("*.safetensors", "*.json", "tokenizer*", "*.jinja"))
            yield self.job(name, ("hf", "download", model, *wanted), "none")

    def _after(self, run: Run, *steps: str) -> list[str]:
        """Return the names of the steps that a step of a run needs: data, discovery, and those given."""
        discovery = ["discover/sails"] if run in self._with_subspace else []
        return [*(job.name for job in self._data()), *discovery, *steps]

    def _discovery(self) -> Iterator[Job]:
        """Find the subspace once for all runs that start in it."""
        if sails := self._with_subspace:
            for run in sails:
                self._check_shared(sails[0], run)
            command = ("sails", "discover", *sails[0].options, "--output_dir", self._found.parent.as_posix())
            yield self.job("discover/sails", command, "one", [job.name for job in self._data()])

    def _check_shared(self, first: Run, run: Run) -> None:
        """Refuse runs that need different subspaces."""
        if self.arguments[run.name].sails.subspace_path is not None:
            raise InputError(f"{run.name} has subspace_path, but the subspace is found in the first step; take it out")
        ours, theirs = (_decides_subspace(self.arguments[of.name]) for of in (run, first))
        if other := [name for name in ours if ours[name] != theirs[name]]:
            raise InputError(
                f"{run.name} has another {', '.join(other)} than {first.name}, but one subspace is found for all;\n"
                "give both the same, or a file to each (sails compare takes different ones)"
            )

    @property
    def _found(self) -> Path:
        return self.output_dir / "discovered" / "subspace"

    @property
    def _with_subspace(self) -> list[Run]:
        """The runs that start in the subspace."""
        return [run for run in self.runs if run.name in self.arguments and self.arguments[run.name].sails.uses_subspace]

    def _trainings(self) -> Iterator[Job]:
        for run in (run for run in self.runs if run.name in self.arguments):
            command = ["sails", "train", run.trainer]
            if self.num_gpus:
                launch = f"accelerate_configs/{LAUNCH[self.engines[run.name]]}"
                command = ["accelerate", "launch", "--config_file", launch]
                command += ["--num_processes", str(self.num_gpus), f"recipes/{run.trainer}_sails.py"]
            command += [*run.options, *self._batch(run)]
            if run in self._with_subspace:
                command += ["--subspace_path", self._found.as_posix()]
            command += ["--resume_from_checkpoint", "true", "--output_dir", self.folder(run)]
            yield self.job(f"train/{run.name}", command, "all", self._after(run))

    def _batch(self, run: Run) -> list[str]:
        """Return gradient accumulation that keeps the batch as large as on the recipe's GPUs."""
        steps = self.arguments[run.name].training.gradient_accumulation_steps * RECIPE_GPUS
        if self.num_gpus in (0, RECIPE_GPUS):
            return []
        return ["--gradient_accumulation_steps", str(max(1, round(steps / self.num_gpus)))]

    def _evaluations(self) -> Iterator[Job]:
        for run in self.runs:
            for kind, options in self.protocol.of_part("test").items():
                output = str(self.output_dir / "evaluated" / run.name / kind)
                command = ("sails", *evaluation(kind, options, run, self.folder(run)), "--output_dir", output)
                yield self.job(f"evaluate/{run.name}/{kind}", command, "one", self._after(run, f"train/{run.name}"))

    def _attacks(self) -> Iterator[Job]:
        """Attack every model by GCG but the base, which needs no attack to comply."""
        safety = option_groups(self.protocol.of_part("test")["safety"])
        shared = [name for name in safety if name.startswith("--judge") or name in SHARED]
        same = [word for name in shared for word in (name, *safety[name])]
        for run in self.runs:
            if self.folder(run) != self.model:
                output = str(self.output_dir / "evaluated" / run.name / "gcg")
                command = ["sails", "attack", "gcg", "--model", self.folder(run), *self.attacked_prompts, *same]
                command += options_of("safety", run) if run.trainer == "none" else []
                command += [*AGAIN, "--output_dir", output]
                yield self.job(f"attack/{run.name}/gcg", command, "one", self._after(run, f"train/{run.name}"))

    @property
    def attacked_prompts(self) -> tuple[str, ...]:
        """Options of the attacks: AdvBench's prompts; the testbed's, if the safety evaluation asks only these."""
        safety = option_groups(self.protocol.of_part("test")["safety"])
        prompts = safety.get("--prompts", PromptArguments().prompts)
        if all(map(is_testbed, prompts)):
            return ("--prompts", *prompts, "--n_prompts", safety.get("--n_prompts", ("8",))[0])
        return GCG


def fitting_engine(args: TrainingPlan, config: PreTrainedConfig, num_gpus: int, gpu_memory_gib: float) -> Fit:
    """Return the first suitable launch configuration in which a training fits (docs/fits.md), else the last one."""
    shape, setup = shape_of(meta_model(args, config)), setup_of(args, config)
    candidates: list[Engine] = ["single"] if num_gpus == 1 else ["zero2", "zero3"]
    if num_gpus > 1 and args.model.use_peft:
        candidates.insert(0, "ddp")
    candidates.append("zero3_offload")
    if setup.quantized_bytes is not None:
        candidates = [engine for engine in candidates if engine in WHOLE_WEIGHTS]
    found = []
    for engine in candidates:
        memory = estimate(engine, shape, setup, num_gpus, num_gpus)
        found.append(Fit(engine, memory, fits(memory, gpu_memory_gib)))
    return next((fit for fit in found if fit.is_enough), found[-1])


def _decides_subspace(args: TrainingPlan) -> dict[str, Any]:
    """Return the options that the found subspace depends on."""
    sails, names = args.sails, ("sae_release", "sae_path", "sae_ids")
    return {
        **sails.subspace_options(),
        **{name: getattr(sails, name) for name in names},
        **{name: getattr(args.model, name) for name in ("model_name_or_path", "lora_r", "dtype")},
        **{name: getattr(args.training, name) for name in ("max_length", "seed")},
        **{"dataset_name": args.script.dataset_name, "helpful_dataset_name": args.data.helpful_dataset_name},
        **{"chat_template_path": args.chat_template_path},
    }


def is_hh_rlhf(name: str | None) -> bool:
    """Return whether a data set is a part of HH-RLHF, where the first step puts it."""
    return str(name).startswith(f"{DATA_FOLDER}/")


def _included(patterns: Iterable[str]) -> list[str]:
    """Return options of `hf download`, which takes a second pattern after one `--include` for the name of a file."""
    return [word for pattern in patterns for word in ("--include", pattern)]
