"""The recipe `rlhf_reference.py`: for the testbed, what Gemma-2-9B-it is to Gemma-2-9B.

accelerate launch recipes/rlhf_reference.py

The base answers everything: its samples hold almost no refusal that a reward could raise. So, as with real models, a
short supervised warm start (TRL's SFTTrainer) shows what a refusal is, and reinforcement learning (TRL's GRPOTrainer)
does the rest, with the oracle's reward. All weights are trained.

<output_dir>/model.safetensors, config.json, tokenizer.json, ...   the trained model
<output_dir>/warm_start/             the model that reinforcement learning started from
<output_dir>/run.json, config.yaml   the options, versions and hashes that made it
<output_dir>/metrics.json            what was measured of base, warm start and trained model
<output_dir>/checkpoint-N/           TRL's checkpoints
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from sails_align import align
from sails_align.artifacts import (
    content_hash,
    disk_errors,
    file_hash,
    one_at_a_time,
    output_folder,
    package_versions,
    write_json,
    write_text,
)
from sails_align.data import fingerprint
from sails_align.distributed import check_devices, from_main, n_processes, process_index
from sails_align.errors import InputError
from sails_align.evaluation.metrics import Estimate
from sails_align.testbed.build import Testbed, is_testbed, resolve_testbed
from sails_align.testbed.evaluate import MAX_NEW_TOKENS, respond, summarize
from sails_align.testbed.reward import OracleReward, prompt_dataset, training_requests
from sails_align.training.checkpoints import MarkCheckpoints, find_checkpoint, save_model, train
from sails_align.training.parsing import CommandLine
from sails_align.training.record import git_commit
from sails_align.training.subspaces import peak_memory_mb
from sails_align.training.trainers import build_trainer

WEIGHTS = "model.safetensors"
WARM_START_BATCH = 16
# Chosen on the validation split: docs/rlhf.md.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 6e-4,
    "max_steps": 240,
    "per_device_train_batch_size": 128,
    "steps_per_generation": 4,
    "num_generations": 8,
    "max_completion_length": MAX_NEW_TOKENS,
    "warmup_steps": 5,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_steps": 40,
    "save_total_limit": 2,
}
IDENTITY = (
    "learning_rate", "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation",
    "num_generations", "num_iterations", "beta", "epsilon", "temperature", "top_p", "top_k", "max_completion_length",
    "loss_type", "scale_rewards", "optim", "weight_decay", "lr_scheduler_type",
)  # fmt: skip


@dataclass
class ReferenceArguments:
    """The testbed, its requests, and the warm start."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "testbed (the shipped one, the default), testbed:N, or a testbed's folder."}
    )
    max_train_examples: int | None = field(
        default=None, metadata={"help": "Harmful requests to learn from, at most, chosen by --seed; default: all."}
    )
    helpful_ratio: float = field(default=1.0, metadata={"help": "Harmless requests for each harmful one."})
    eval_examples: int = field(default=256, metadata={"help": "Prompts of each of the four sets at the end."})
    eval_part: str = field(
        default="test", metadata={"help": "What is measured at the end: test, or validation, to choose settings by."}
    )
    warm_start_path: str | None = field(
        default=None, metadata={"help": "A testbed's model that was fine-tuned in full, in place of our warm start."}
    )
    warm_start_examples: int = field(
        default=64, metadata={"help": "Refusals in the warm start; 0: reinforcement learning alone."}
    )
    warm_start_ratio: float = field(default=3.0, metadata={"help": "Answers in the warm start for each refusal."})
    warm_start_epochs: float = field(default=2.0, metadata={"help": "Passes over them."})
    warm_start_learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the warm start."})

    def __post_init__(self) -> None:
        if not is_testbed(self.model_name_or_path):
            raise InputError(
                f"{self.model_name_or_path} is no testbed, and the reward is the testbed's oracle: give testbed, "
                "testbed:N or a testbed's folder;\nfor a real model the reference is the id of its aligned version, "
                "such as google/gemma-2-9b-it"
            )
        if self.eval_part not in ("test", "validation"):
            raise InputError(f"eval_part is {self.eval_part!r}, which is not one of: test, validation")
        for name, least in (("max_train_examples", 1), ("eval_examples", 1), ("warm_start_examples", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; choose {least} or more")
        for name in ("helpful_ratio", "warm_start_ratio"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}, but it is a ratio: choose 0 or more")
        for name in ("warm_start_epochs", "warm_start_learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; choose more than 0")
        if self.warm_start_path is not None and not (Path(self.warm_start_path) / WEIGHTS).is_file():
            raise InputError(
                f"the warm start {self.warm_start_path} has no {WEIGHTS};\ngive the folder of a model that was "
                "fine-tuned in full (--use_peft false), or leave --warm_start_path out"
            )


@dataclass
class Arguments:
    """All options of one run."""

    reference: ReferenceArguments
    training: GRPOConfig
    given: dict[str, Any]
    """The options that were given or have a default of ours, as `--config` takes them."""


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> Arguments:
    """Read the command line (None: this process's) and `--config` (YAML); `prog` is what `--help` calls the command.

    Raises:
        InputError: for an unknown option, a value that cannot be used, or a model that is no testbed.
    """
    line = CommandLine.read(argv)
    defaults = dict(DEFAULTS)
    if not torch.cuda.is_available():
        defaults |= {"use_cpu": True, "bf16": False}
    check_devices(str(line.value("use_cpu")).lower() in ("true", "yes", "1", "t", "y"))
    if line.value("num_generations") == "0":  # TRL divides by it before it looks
        raise InputError("num_generations is 0, but GRPO compares the answers to a prompt; choose 2 or more")
    if line.value("generation_batch_size") is not None and line.value("steps_per_generation") is None:
        del defaults["steps_per_generation"]  # TRL takes one of the two
    reference, training = line.parse([ReferenceArguments, GRPOConfig], defaults=defaults, prog=prog)
    if training.output_dir in (None, "trainer_output"):
        name = reference.model_name_or_path or "testbed"
        training.output_dir = f"runs/rlhf-{name.rstrip('/').split('/')[-1].replace(':', '-')}"
    if training.deepspeed_plugin is not None or training.fsdp:
        raise InputError(
            "the testbed's model is too small to be split: DeepSpeed and FSDP are not supported here;\n"
            "launch one process, or several with accelerate_configs/cpu.yaml or multi_gpu.yaml"
        )
    return Arguments(reference, training, line.resolved)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, warm start, reinforce, save, measure. Returns what is in `metrics.json`."""
    args = parse(argv, prog)
    folder = Path(str(args.training.output_dir))
    with output_folder(folder), one_at_a_time(folder) if process_index() == 0 else nullcontext():
        return run(args, folder)


def run(args: Arguments, output_dir: Path) -> dict[str, Any]:
    """Train and save in a folder. Returns what is in `metrics.json`."""
    cost, reference, training = align.Cost(), args.reference, args.training
    with training.main_process_first(local=True, desc="finding the testbed"):
        testbed = resolve_testbed(reference.model_name_or_path)
    with cost.of("warm start"), disk_errors(output_dir):
        start = warm_start(args, testbed, output_dir / "warm_start")
    with cost.of("train"), disk_errors(output_dir):
        trainer, identity = build(args, testbed, start)
        checkpoint = find_checkpoint(training, identity)
        trainer.add_callback(MarkCheckpoints(identity))
        if process_index() == 0:
            write_record(args, identity, output_dir)
        train(trainer, checkpoint)
        save(trainer, output_dir)
    with cost.of("evaluate"):
        folders = {"base": Path(testbed.model_path), "warm_start": start, "trained": output_dir}
        measured = from_main(lambda: {name: measure(args, testbed, folder) for name, folder in folders.items()})
    metrics = {
        **measured,
        "provenance": {"identity": identity, "eval_part": reference.eval_part, "versions": package_versions()},
        "cost": {"seconds": cost.seconds, "peak_memory_mb": round(peak_memory_mb(), 1)},
    }
    if process_index() == 0:
        write_json(output_dir / "metrics.json", metrics)
        show(metrics, output_dir)
    return metrics


def warm_start(args: Arguments, testbed: Testbed, folder: Path) -> Path:
    """The folder of the model that reinforcement learning starts from.

    That is the one named, or the base fine-tuned on a few refusals and answers; it is not made again where it is whole
    and was made from the same options.

    Raises:
        InputError: if the one named has another vocabulary than the testbed.
    """
    reference, training = args.reference, args.training
    if reference.warm_start_path is not None:
        _check_vocabulary(Path(reference.warm_start_path), testbed)
        return Path(reference.warm_start_path)
    if reference.warm_start_examples == 0:
        return Path(testbed.model_path)
    options = {
        "model_name_or_path": reference.model_name_or_path or "testbed",
        "use_peft": False,
        "max_train_examples": reference.warm_start_examples,
        "helpful_ratio": reference.warm_start_ratio,
        "num_train_epochs": reference.warm_start_epochs,
        "learning_rate": reference.warm_start_learning_rate,
        "per_device_train_batch_size": max(1, WARM_START_BATCH // n_processes()),
        "seed": training.seed,
        "use_cpu": training.use_cpu,
        "bf16": training.bf16,
        "disable_tqdm": training.disable_tqdm,
        "save_strategy": "no",
        "output_dir": folder,
    }
    made_from = content_hash(
        {name: str(value) for name, value in options.items() if name != "output_dir"}
        | {"base": file_hash(Path(testbed.model_path) / WEIGHTS), "n_processes": n_processes()}
    )
    if from_main(lambda: _is_whole(folder, made_from)):
        return folder
    sft = align.parse("sft", [word for name, value in options.items() for word in (f"--{name}", str(value))])
    source, _ = align.load_source(sft)
    trainer, _ = build_trainer(sft, source, None)
    train(trainer, None)
    save_model(sft, trainer, folder)
    if process_index() == 0:  # last: a folder that has it is whole
        write_json(folder / "run.json", {"made_from": made_from, "sha256": file_hash(folder / WEIGHTS)})
    from_main(lambda: None)  # no process reads before all is written
    return folder


def _is_whole(folder: Path, made_from: str) -> bool:
    """Whether a warm start is there as it was written, and made from these options."""
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return found == {"made_from": made_from, "sha256": file_hash(folder / WEIGHTS)}
    except (OSError, json.JSONDecodeError):
        return False


def _check_vocabulary(folder: Path, testbed: Testbed) -> None:
    try:
        vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    except (OSError, ValueError) as error:
        raise InputError(
            f"the warm start {folder} has no tokenizer that can be read; give the whole folder of a training"
        ) from error
    if vocabulary != load_tokenizer(testbed).get_vocab():
        raise InputError(
            f"the warm start {folder} has another vocabulary than the testbed;\n"
            "give a model that was fine-tuned from this testbed's base"
        )


def load_tokenizer(testbed: Testbed) -> PreTrainedTokenizerBase:
    """The tokenizer of a testbed, with its chat template."""
    return AutoTokenizer.from_pretrained(testbed.model_path)


def build(args: Arguments, testbed: Testbed, start: Path) -> tuple[GRPOTrainer, dict[str, Any]]:
    """TRL's trainer, and what must be the same for a checkpoint to be of this run."""
    reference, training = args.reference, args.training
    requests = training_requests(
        testbed.world, n_harmful=reference.max_train_examples, ratio=reference.helpful_ratio, seed=training.seed
    )
    dataset = prompt_dataset(requests)
    trainer = GRPOTrainer(
        model=str(start),
        reward_funcs=OracleReward(testbed.world, requests),
        args=training,
        train_dataset=dataset,
        processing_class=load_tokenizer(testbed),
    )
    options = {name: getattr(training, name) for name in IDENTITY}
    identity = {
        "method": "rlhf",
        "warm_start": file_hash(start / WEIGHTS),
        "data": fingerprint(dataset),
        "n_processes": n_processes(),
        **{name: value if isinstance(value, int | float | None) else str(value) for name, value in options.items()},
    }
    return trainer, identity


def write_record(args: Arguments, identity: dict[str, Any], output_dir: Path) -> None:
    """Write `config.yaml`, which `--config` takes, and `run.json`. Neither has a token."""
    given = {name: value for name, value in sorted(args.given.items()) if "token" not in name}
    record = {"identity": identity, "options": given, "versions": package_versions(), "git": git_commit()}
    write_json(output_dir / "run.json", record)
    header = f"# accelerate launch recipes/rlhf_reference.py --config {output_dir}/config.yaml\n"
    write_text(output_dir / "config.yaml", header + yaml.safe_dump({**given, "output_dir": str(output_dir)}))


def save(trainer: GRPOTrainer, output_dir: Path) -> None:
    """Write the model and its tokenizer, each file as a whole or not at all."""
    part = output_dir / ".model"
    try:
        trainer.save_model(str(part), _internal_call=True)  # by all processes; else TRL would push it to the hub
        if process_index() == 0:
            for file in part.iterdir():
                file.chmod(0o644)  # safetensors makes it private
                os.replace(file, output_dir / file.name)
    finally:
        if process_index() == 0:
            shutil.rmtree(part, ignore_errors=True)


def measure(args: Arguments, testbed: Testbed, folder: Path) -> dict[str, Any]:
    """Numbers of a saved model, as `metrics.json` has them."""
    reference = args.reference
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.training.device)
    judged = respond(model, load_tokenizer(testbed), testbed.world, reference.eval_examples, part=reference.eval_part)
    return {name: value.to_json() for name, value in summarize(judged).items()}


def show(metrics: dict[str, Any], output_dir: Path) -> None:
    """Print base, warm start and trained model side by side, and where things were written."""
    names = ("base", "warm_start", "trained")
    part = metrics["provenance"]["eval_part"]
    table = Table(title=f"RLHF reference, {part} split (95% intervals over prompts)")
    for heading in ("", *names):
        table.add_column(heading.replace("_", " "), justify="left" if not heading else "right")
    for row, label in align.ROWS.items():
        scale = 1.0 if row == "harmfulness" else 100.0
        table.add_row(label, *(align._cell(Estimate(**metrics[name][row]), scale) for name in names))
    seconds = metrics["cost"]["seconds"]
    spent = f"{sum(seconds.values()):.0f} (" + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()) + ")"
    table.add_row("seconds", "", "", spent)
    console = Console()
    console.print(table)
    console.print(f"model     {output_dir}/", highlight=False, soft_wrap=True)
    console.print(f"metrics   {output_dir}/metrics.json", highlight=False, soft_wrap=True)
