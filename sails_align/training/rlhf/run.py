"""The recipe `rlhf_reference.py`: for the testbed, what Gemma-2-9B-it is to Gemma-2-9B.

accelerate launch recipes/rlhf_reference.py

The base answers everything: one in a thousand of its samples is a refusal that a reward could raise. So, as with real
models, a short supervised warm start (TRL's SFTTrainer) shows what a refusal is, and reinforcement learning (TRL's
GRPOTrainer) does the rest, with the oracle's reward. All weights are trained.

<output_dir>/model.safetensors, config.json, tokenizer.json, ...   the trained model
<output_dir>/warm_start/             the model that reinforcement learning started from
<output_dir>/run.json, config.yaml   the options, versions and hashes that made it
<output_dir>/metrics.json            what was measured of base, warm start and trained model
<output_dir>/checkpoint-N/           TRL's checkpoints
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOTrainer

from sails_align.core.artifacts import file_hash, package_versions
from sails_align.core.cost import Cost, peak_memory_mb
from sails_align.core.distributed import from_main, n_processes, process_index
from sails_align.core.errors import InputError
from sails_align.core.files import disk_errors, work_folder, write_json, write_text
from sails_align.data.pairs import fingerprint
from sails_align.evaluation.metrics import METRICS, Estimate
from sails_align.export.card import write_card
from sails_align.testbed import prompts as requests
from sails_align.testbed.build import Testbed, resolve_testbed
from sails_align.testbed.reward import OracleReward, prompt_dataset, training_requests
from sails_align.training.checkpoints import MarkCheckpoints, find_checkpoint, saved_whole, train
from sails_align.training.record import git_commit
from sails_align.training.rlhf.options import WEIGHTS, RlhfPlan, parse
from sails_align.training.rlhf.warm_start import warm_start
from sails_align.training.table import ESTIMATES

IDENTITY = (
    "learning_rate", "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation",
    "num_generations", "num_iterations", "beta", "epsilon", "temperature", "top_p", "top_k", "max_completion_length",
    "loss_type", "scale_rewards", "optim", "weight_decay", "lr_scheduler_type",
)  # fmt: skip


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, warm start, reinforce, save, measure. Returns what is in `metrics.json`."""
    args = parse(argv, prog)
    folder = Path(str(args.training.output_dir))
    with work_folder(folder) if process_index() == 0 else nullcontext():
        return run(args, folder)


def run(args: RlhfPlan, output_dir: Path) -> dict[str, Any]:
    """Train and save in a folder. Returns what is in `metrics.json`."""
    cost, reference, training = Cost(), args.reference, args.training
    with training.main_process_first(local=True, desc="finding the testbed"):
        testbed = resolve_testbed(reference.model_name_or_path)
    with cost.of("warm start"), disk_errors(output_dir):
        start = warm_start(args, testbed, output_dir / "warm_start")
    with cost.of("train"), disk_errors(output_dir):
        trainer, identity = build(args, testbed, start)
        checkpoint = find_checkpoint(trainer.args, identity)
        trainer.add_callback(MarkCheckpoints(identity))
        if process_index() == 0:
            write_record(args, identity, len(trainer.train_dataset), output_dir)
        train(trainer, checkpoint)
        with saved_whole(trainer, output_dir):
            pass  # nothing to complete
    with cost.of("evaluate"):
        base = Path(testbed.model_path)
        folders = {"base": base, **({"warm_start": start} if start != base else {}), "trained": output_dir}
        measured = from_main(lambda: {name: measure(args, testbed, folder) for name, folder in folders.items()})
    metrics = {
        **measured,
        "provenance": {"identity": identity, "eval_part": reference.eval_part, "versions": package_versions()},
        "cost": {"seconds": cost.seconds, "peak_memory_mb": round(peak_memory_mb(), 1)},
    }
    if process_index() == 0:
        write_json(output_dir / "metrics.json", metrics)
        write_card(output_dir, output_dir)  # in place of TRL's, which knows nothing of the model
        show(metrics, output_dir)
    return metrics


def load_tokenizer(testbed: Testbed) -> PreTrainedTokenizerBase:
    """The tokenizer of a testbed, with its chat template."""
    return AutoTokenizer.from_pretrained(testbed.model_path)


def build(args: RlhfPlan, testbed: Testbed, start: Path) -> tuple[Any, dict[str, Any]]:
    """TRL's trainer, and what must be the same for a checkpoint to be of this run.

    Raises:
        InputError: for options that TRL's trainer cannot use together, or that need a package that is not installed.
    """
    reference, training = args.reference, args.training
    requests = training_requests(
        testbed.world, n_harmful=reference.max_train_examples, ratio=reference.helpful_ratio, seed=training.seed
    )
    dataset = prompt_dataset(requests)
    try:
        trainer = GRPOTrainer(
            model=str(start),
            reward_funcs=OracleReward(testbed.world, requests),  # pyright: ignore[reportArgumentType] -- never None
            args=training,
            train_dataset=dataset,
            processing_class=load_tokenizer(testbed),
        )
    except (ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"TRL's trainer cannot be made of these options: {first}") from error
    options = {name: getattr(training, name) for name in IDENTITY}
    identity = {
        "method": "rlhf",
        "warm_start": file_hash(start / WEIGHTS),
        "data": fingerprint(dataset),
        "n_processes": n_processes(),
        **{name: value if isinstance(value, int | float | None) else str(value) for name, value in options.items()},
    }
    return trainer, identity


def write_record(args: RlhfPlan, identity: dict[str, Any], n_requests: int, output_dir: Path) -> None:
    """Write `config.yaml`, which `--config` takes, and `run.json`. Neither has a token."""
    given = {name: value for name, value in sorted(args.given.items()) if "token" not in name}
    record = {
        "identity": identity,
        "options": {
            "model": {"model_name_or_path": args.reference.model_name_or_path or "testbed"},
            "reference": vars(args.reference),
            "script": {"dataset_name": None},
            "training": json.loads(args.training.to_json_string()),  # which masks tokens
        },
        "versions": package_versions(),
        "git": git_commit(),
        "data": {"train": {"rows": n_requests, "sha256": identity["data"]}},
    }
    write_json(output_dir / "run.json", record)
    header = f"# accelerate launch recipes/rlhf_reference.py --config {output_dir}/config.yaml\n"
    write_text(output_dir / "config.yaml", header + yaml.safe_dump({**given, "output_dir": str(output_dir)}))


def measure(args: RlhfPlan, testbed: Testbed, folder: Path) -> dict[str, Any]:
    """Numbers of a saved model, as `metrics.json` has them."""
    reference = args.reference
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(args.training.device)
    n, part = reference.eval_examples, reference.eval_part
    result = requests.measure(model, load_tokenizer(testbed), testbed, n, part=part)
    return {name: value.to_json() for name, value in requests.numbers(result).items()}


def show(metrics: dict[str, Any], output_dir: Path) -> None:
    """Print base, warm start and trained model side by side, and where things were written."""
    names = [name for name in ("base", "warm_start", "trained") if name in metrics]
    part = metrics["provenance"]["eval_part"]
    table = Table(title=f"RLHF reference, {part} split (95% intervals over prompts)")
    for heading in ("", *names):
        table.add_column(heading.replace("_", " "), justify="left" if not heading else "right")
    for metric in (METRICS[name] for name in ESTIMATES):
        estimates = (Estimate(**metrics[name][metric.name]) for name in names)
        table.add_row(metric.heading, *map(metric.with_interval, estimates))
    seconds = metrics["cost"]["seconds"]
    spent = f"{sum(seconds.values()):.0f} (" + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()) + ")"
    table.add_row("seconds", *[""] * (len(names) - 1), spent)
    console = Console()
    console.print(table)
    console.print(f"model     {output_dir}/", highlight=False, soft_wrap=True)
    console.print(f"metrics   {output_dir}/metrics.json", highlight=False, soft_wrap=True)
