"""Everything that reproducing the paper on a model takes, as commands in their order: what `recipes/reproduce.py` runs,
and what can be typed by hand.

The settings are those of a comparison's file (`recipes/configs/<model>/compare.yaml`): runs and evaluations. Here each
run is trained once, at its recipe's own learning rate.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from sails_align.core.artifacts import file_hash
from sails_align.core.errors import InputError
from sails_align.evaluation.options import PromptArguments
from sails_align.experiments.commands import AGAIN, OPTIONS, evaluation, options_of
from sails_align.experiments.jobs import Gpus, Job
from sails_align.experiments.plan import Protocol, Run, option_groups
from sails_align.subspace.options import Method
from sails_align.testbed.build import is_testbed
from sails_align.training import run as align
from sails_align.training.estimate import as_on_gpu
from sails_align.training.memory import Engine
from sails_align.training.plan import TrainingPlan

LAUNCH: dict[Engine, str] = {
    "single": "single_gpu.yaml",
    "ddp": "multi_gpu.yaml",
    "zero2": "zero2.yaml",
    "zero3": "zero3.yaml",
    "zero3_offload": "zero3_offload.yaml",
}
"""Files in `accelerate_configs` of the engines that are chosen among."""
METHODS = get_args(Method)
RECIPE_GPUS = 8
"""For which the recipes' batch sizes are."""
GCG = {"prompts": "advbench", "n_prompts": "50"}
"""Ours: the paper's number of attacked prompts is not known."""
DATA = "Anthropic/hh-rlhf"
DATA_FOLDER = "data/hh-rlhf"


@dataclass(frozen=True)
class Step:
    """A command, and what it is part of."""

    stage: Literal["data", "discover", "train", "evaluate", "attack"]
    run: str
    """What it is about; with the stage it names the step."""
    argv: tuple[str, ...]
    """As it is typed in the repository's folder."""
    gpus: Gpus
    kind: str = ""
    """Of an evaluation."""

    @property
    def name(self) -> str:
        """Of the step, unlike all others'."""
        return "/".join(part for part in (self.stage, self.run, self.kind) if part)

    @property
    def file_name(self) -> str:
        """Of its log and its result, without a suffix."""
        return self.name.replace("/", ".")

    @property
    def record(self) -> dict[str, Any]:
        """What decides its result: its command, and what is in the file that it reads options from."""
        (config,) = option_groups(self.argv).get("--config", ("",))
        sha256 = file_hash(Path(config)) if Path(config).is_file() else None
        return {"argv": list(self.argv), "config": sha256}

    @property
    def folder(self) -> Path:
        """Where its results are."""
        options = option_groups(self.argv)
        return Path(*options.get("--output_dir", options.get("--local-dir", (".",))))


@dataclass(frozen=True)
class Reproduction:
    """What is reproduced, where, and on how many GPUs."""

    runs: tuple[Run, ...]
    protocol: Protocol
    output_dir: Path
    num_gpus: int
    """0: this machine's CPUs, in one process."""
    engines: Mapping[str, Engine]
    """By run; not of models that are evaluated as they are."""
    only: tuple[str, ...] = ()
    """How the names of the steps begin that are wanted; empty: all steps."""

    def folder(self, run: Run) -> str:
        """The model of a run: its folder, or what it is called."""
        return run.options[1] if run.trainer == "none" else str(self.output_dir / run.name)

    def steps(self) -> list[Step]:
        """Those that are wanted, in an order in which they can be run."""
        found = [*self._data(), *self._discovery(), *self._trainings(), *self._evaluations(), *self._attacks()]
        return [step for step in found if not self.only or step.name.startswith(self.only)]

    def jobs(self) -> list[Job]:
        """The wanted steps as jobs: each a command, with a file in `done/` once it has ended well."""
        return [self.job(step) for step in self.steps()]

    def job(self, step: Step) -> Job:
        """A step as a job."""
        return Job(
            name=step.name,
            work=step.argv,
            result=self._done(step.file_name),
            log=self.output_dir / "logs" / f"{step.file_name}.log",
            record=step.record,
            folder=step.folder,
            gpus=step.gpus,
            after=self._needs(step),
            outdates=tuple(self._done(name) for name in self._built_on(step)),
            keeps_log=True,
        )

    @property
    def n_gpus(self) -> dict[Gpus, int]:
        """GPUs of a job on a cluster, by what it needs."""
        one = min(1, self.num_gpus)
        return {"none": 0, "one": one, "share": one, "all": self.num_gpus}

    def _done(self, file_name: str) -> Path:
        return self.output_dir / "done" / f"{file_name}.json"

    def _needs(self, step: Step) -> tuple[str, ...]:
        """Names of the steps that another one cannot do without."""
        data = ["data/hh-rlhf", *(f"data/{model.rpartition('/')[2]}" for model in self.hub_models)]
        match step.stage:
            case "data":
                return ()
            case "discover":
                return tuple(data)
            case "train":
                starts = step.run in {run.name for run in self.with_subspace}
                return (*data, *(["discover/sails"] if starts else []))
            case "evaluate" | "attack":
                return (*data, f"train/{step.run}")

    def _built_on(self, step: Step) -> Iterator[str]:
        """File names of the steps that start from a step's results."""
        match step.stage:
            case "discover":
                runs = [run.name for run in self.with_subspace]
                yield from (f"train.{run}" for run in runs)
            case "train":
                runs = [step.run]
            case _:
                return
        for run in runs:
            yield from (*(f"evaluate.{run}.{kind}" for kind in OPTIONS), f"attack.{run}.gcg")

    @property
    def model(self) -> str:
        """The base model: what is trained."""
        return str(next(iter(self.arguments.values())).model.model_name_or_path)

    @property
    def hub_models(self) -> list[str]:
        """The models that are taken from the hub: the base, and those that are evaluated as they are."""
        models = dict.fromkeys([self.model, *(run.options[1] for run in self.runs if run.trainer == "none")])
        return [model for model in models if not Path(model).exists() and not is_testbed(model)]

    @cached_property
    def arguments(self) -> dict[str, TrainingPlan]:
        """Of each training its options, as its recipe and the file have them, on the machine that is planned for."""
        return {
            run.name: align.parse(run.trainer, as_on_gpu(run.options) if self.num_gpus else list(run.options))  # pyright: ignore[reportArgumentType]
            for run in self.runs
            if run.trainer in METHODS
        }

    def _data(self) -> Iterator[Step]:
        named = [(args.script.dataset_name, args.data.helpful_dataset_name) for args in self.arguments.values()]
        names = {name for pair in named for name in pair}
        parts = sorted(Path(name).name for name in names if name is not None and is_hh_rlhf(name))
        if parts:
            command = ["hf", "download", DATA, "--repo-type", "dataset", "--local-dir", DATA_FOLDER]
            yield Step("data", "hh-rlhf", (*command, *_included(f"{part}/*" for part in parts)), "none")
        for model in self.hub_models:
            wanted = _included(("*.safetensors", "*.json", "tokenizer*", "*.jinja"))
            yield Step("data", model.rpartition("/")[2], ("hf", "download", model, *wanted), "none")

    def _discovery(self) -> Iterator[Step]:
        """Once for all runs that start in the subspace, which must therefore want the same one."""
        if sails := self.with_subspace:
            for run in sails:
                self._check_shared(sails[0], run)
            command = ("sails", "discover", *sails[0].options, "--output_dir", self._found.parent.as_posix())
            yield Step("discover", "sails", command, "one")

    def _check_shared(self, first: Run, run: Run) -> None:
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
    def with_subspace(self) -> list[Run]:
        """The runs that start in the subspace."""
        return [run for run in self.runs if run.name in self.arguments and self.arguments[run.name].sails.uses_subspace]

    def _trainings(self) -> Iterator[Step]:
        found = {run.name for run in self.with_subspace}
        for run in self.runs:
            if run.name not in self.arguments:
                continue
            words = [*run.options, *self._batch(run)]
            words += ["--subspace_path", self._found.as_posix()] if run.name in found else []
            words += ["--resume_from_checkpoint", "true", "--output_dir", self.folder(run)]
            command = ["sails", "train", run.trainer]
            if self.num_gpus:
                launch = ["--config_file", f"accelerate_configs/{LAUNCH[self.engines[run.name]]}"]
                command = ["accelerate", "launch", *launch, "--num_processes", str(self.num_gpus)]
                command += [f"recipes/{run.trainer}_sails.py"]
            yield Step("train", run.name, (*command, *words), "all")

    def _batch(self, run: Run) -> list[str]:
        """Gradient accumulation that leaves the batch as large as on the GPUs that the recipe is for."""
        training = self.arguments[run.name].training
        steps = training.gradient_accumulation_steps * RECIPE_GPUS
        if self.num_gpus in (0, RECIPE_GPUS):
            return []
        return ["--gradient_accumulation_steps", str(max(1, round(steps / self.num_gpus)))]

    def _evaluations(self) -> Iterator[Step]:
        for run in self.runs:
            for kind, options in self.protocol.of_part("test").items():
                output = str(self.output_dir / "evaluated" / run.name / kind)
                command = ("sails", *evaluation(kind, options, run, self.folder(run)), "--output_dir", output)
                yield Step("evaluate", run.name, command, "one", kind)

    def _attacks(self) -> Iterator[Step]:
        """GCG on every model but the base, which needs no attack to comply."""
        safety = option_groups(self.protocol.of_part("test")["safety"])
        judge = [word for name, values in safety.items() if name.startswith("--judge") for word in (name, *values)]
        asked = self.attacked_prompts(safety)
        for run in self.runs:
            if self.folder(run) != self.model:
                output = str(self.output_dir / "evaluated" / run.name / "gcg")
                command = ["sails", "attack", "gcg", "--model", self.folder(run), *asked, *judge]
                command += options_of("safety", run) if run.trainer == "none" else []
                yield Step("attack", run.name, (*command, *AGAIN, "--output_dir", output), "one", "gcg")

    def attacked_prompts(self, safety: Mapping[str, Any]) -> list[str]:
        """Options: AdvBench's prompts; the testbed's, if all prompts are."""
        prompts = safety.get("--prompts", PromptArguments().prompts)
        if all(map(is_testbed, prompts)):
            return ["--prompts", *prompts, "--n_prompts", safety.get("--n_prompts", ("8",))[0]]
        return [word for name, value in GCG.items() for word in (f"--{name}", value)]


def _decides_subspace(args: TrainingPlan) -> dict[str, Any]:
    """The options that the found subspace depends on."""
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
    """Whether a data set is a part of HH-RLHF, where the first step puts it."""
    return str(name).startswith(f"{DATA_FOLDER}/")


def _included(patterns: Iterable[str]) -> list[str]:
    """Options of `hf download`, which takes a second pattern after one `--include` for the name of a file."""
    return [word for pattern in patterns for word in ("--include", pattern)]
