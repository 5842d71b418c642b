"""The recipes `sft_sails.py` and `dpo_sails.py`: SAE features -> safety subspace -> adapters -> TRL's trainers.

accelerate launch recipes/sft_sails.py                       the testbed
accelerate launch recipes/dpo_sails.py --config FILE.yaml    anything else
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig, SFTTrainer

from sails_align.artifacts import disk_errors, output_folder, package_versions, write_json, write_text
from sails_align.config import DataArguments, Method, ReferenceArguments, SailsArguments, to_json
from sails_align.errors import InputError
from sails_align.evaluation.metrics import Estimate
from sails_align.testbed.build import MODEL_NAME, Testbed, is_testbed, resolve_testbed
from sails_align.testbed.evaluate import alignment_data, respond, summarize
from sails_align.training.parsing import CommandLine
from sails_align.training.run import (
    MarkCheckpoints,
    build_sft_trainer,
    find_checkpoint,
    left_out,
    run_identity,
    save_adapter,
    train,
)
from sails_align.training.source import Source, assemble, load_data
from sails_align.training.subspaces import DiscoveryOptions, find_subspace, peak_memory_mb

# Defaults of options that TRL and PEFT leave at values for other purposes; YAML and the command line override them.
COMMON_DEFAULTS = {
    "use_peft": True,
    "lora_dropout": 0.0,
    "warmup_steps": 0.1,
    "logging_steps": 10,
    "save_total_limit": 2,
}
# TRL's defaults for full fine-tuning; its documentation advises ten times the rate for LoRA.
LEARNING_RATES = {("sft", False): 2e-5, ("sft", True): 2e-4, ("dpo", False): 1e-6, ("dpo", True): 1e-5}
TESTBED_DEFAULTS = {
    "lora_r": 8,
    "lora_alpha": 16,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "num_train_epochs": 4,
    "max_train_examples": 512,
    "max_length": 64,
    "gradient_checkpointing": False,
    "save_steps": 20,
}
# Chosen on the validation split: docs/method.md, docs/training.md.
TESTBED_LEARNING_RATES = {("sft", False): 1e-3, ("sft", True): 8e-3, ("dpo", False): 1e-4, ("dpo", True): 2e-3}


@dataclass
class Arguments:
    """All options of one training."""

    method: Method
    sails: SailsArguments
    data: DataArguments
    script: ScriptArguments
    training: SFTConfig | DPOConfig
    model: ModelConfig
    reference: ReferenceArguments

    def to_json(self) -> dict[str, Any]:
        """Every option, resolved. Secrets are masked by transformers."""
        training = {name: value for name, value in self.training.to_dict().items() if _is_json(value)}
        parts = {"sails": to_json(self.sails), "data": to_json(self.data), "training": training}
        parts |= {"script": vars(self.script), "model": vars(self.model), "reference": vars(self.reference)}
        return {"method": self.method, **parts}


@dataclass
class Cost:
    """Seconds spent by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Add the time the block takes to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = self.seconds.get(stage, 0.0) + time.perf_counter() - started
            self.seconds[stage] = round(spent, 2)


def parse(method: Method, argv: Sequence[str] | None = None, prog: str | None = None) -> Arguments:
    """Read the command line (None: this process's) and `--config` (YAML); `prog` is what `--help` calls the command.

    Raises:
        InputError: for an unknown option, a value that cannot be used, or options that contradict each other.
    """
    line = CommandLine.read(argv)
    model_name = line.value("model_name_or_path")
    use_peft = str(line.value("use_peft")).lower() not in ("false", "no", "0", "n", "f")
    rates = TESTBED_LEARNING_RATES if is_testbed(model_name) else LEARNING_RATES
    defaults: dict[str, Any] = {**COMMON_DEFAULTS, "learning_rate": rates[method, use_peft]}
    if is_testbed(model_name):
        defaults |= TESTBED_DEFAULTS
    if not torch.cuda.is_available():
        defaults |= {"use_cpu": True, "bf16": False}
    config_class = SFTConfig if method == "sft" else DPOConfig
    classes = [SailsArguments, DataArguments, ScriptArguments, config_class, ModelConfig, ReferenceArguments]
    arguments = Arguments(method, *line.parse(classes, defaults=defaults, prog=prog))
    _settle(arguments)
    training = arguments.training
    if training.output_dir in (None, "trainer_output"):
        stem = "testbed" if model_name is None else model_name.rstrip("/").split("/")[-1].replace(":", "-")
        training.output_dir = f"runs/{method}-{start_of(arguments)}-{stem}"
    return arguments


def _settle(args: Arguments) -> None:
    """Refuse options that contradict each other, and settle what `--init` is where it was left out."""
    sails, reference = args.sails, args.reference.ref_model_name_or_path
    if not args.model.use_peft:
        given = [name for name in ("init", "adapter_path", "subspace_path") if getattr(sails, name) is not None]
        if given:
            raise InputError(
                f"--use_peft false trains all weights, without an adapter, but --{given[0]} is given; "
                "leave one of them out"
            )
    elif sails.init is None and sails.adapter_path is None:
        sails.init = "sails"
    if reference is not None and args.method == "sft":
        raise InputError("--ref_model_name_or_path is given, but SFT has no reference model; leave it out")


def start_of(args: Arguments) -> str:
    """What training starts from, in one word: the initialisation, `adapter`, or `full` fine-tuning."""
    return args.sails.init or ("adapter" if args.sails.adapter_path is not None else "full")


def main(method: Method, argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, build, train, save. Returns what is in `metrics.json`."""
    args = parse(method, argv, prog)
    with output_folder(Path(str(args.training.output_dir))) as output_dir:
        return run(args, output_dir)


def run(args: Arguments, output_dir: Path) -> dict[str, Any]:
    """Build, train and save in a folder. Returns what is in `metrics.json`."""
    cost = Cost()
    with cost.of("prepare"):
        source, testbed = load_source(args)
    subspace = None
    if args.sails.uses_subspace:
        # Of several processes the first one writes the artifact, which the others then read.
        with cost.of("subspace"), args.training.main_process_first(local=False, desc="finding the subspace"):
            subspace = find_subspace(args.sails, source, discovery_options(args), output_dir / "subspace")
    with cost.of("prepare"), disk_errors(output_dir):
        trainer, _ = build_sft_trainer(args.sails, args.training, args.model, source, subspace)
        identity = run_identity(args.sails, args.training, args.model, source, subspace)
        checkpoint = find_checkpoint(args.training, identity)
        trainer.add_callback(MarkCheckpoints(identity))
        write_json(output_dir / "run.json", {"identity": identity, "options": args.to_json()})
    with cost.of("evaluate"):
        base, base_responses = measure(trainer, source, testbed, args, base=True)
    with cost.of("train"), disk_errors(output_dir):
        train(trainer, checkpoint)
        save_adapter(trainer, output_dir)
    with cost.of("evaluate"):
        trained, responses = measure(trainer, source, testbed, args, base=False)
    metrics = {
        "base": base,
        "trained": trained,
        "provenance": {
            "identity": identity,
            "options": args.to_json(),
            "dropped_rows": source.dropped,
            "longer_than_max_length": left_out(trainer, source),
            "saes": None if subspace is None else subspace.provenance.get("saes"),
            "versions": package_versions(),
        },
        "cost": {
            "seconds": cost.seconds,
            "trainable_parameters": _n_trainable(trainer),
            "trainable_share": _n_trainable(trainer) / _n_parameters(trainer),
            "peak_memory_mb": round(peak_memory_mb(), 1),
        },
    }
    if trainer.is_world_process_zero():
        if testbed is not None:
            write_text(
                output_dir / "responses.jsonl", "".join(json.dumps(row) + "\n" for row in base_responses + responses)
            )
        write_json(output_dir / "metrics.json", metrics)
        show(metrics, output_dir)
    return metrics


def load_source(args: Arguments) -> tuple[Source, Testbed | None]:
    """Model, tokenizer and data: of the testbed if that is the model, else of what is named."""
    training = args.training
    if not is_testbed(args.model.model_name_or_path):
        return assemble(args.model, training, args.data, load_data(args.script, args.data, training.seed)), None
    testbed = resolve_testbed(args.model.model_name_or_path)
    args.model.model_name_or_path = testbed.model_path
    if args.sails.sae_release is None and args.sails.sae_path is None:
        args.sails.sae_path = testbed.sae_path
    if args.script.dataset_name is not None:
        data = load_data(args.script, args.data, training.seed)
    else:
        world, seed = testbed.world, training.seed
        safety = alignment_data(world, harmful=True, n=args.data.max_train_examples, seed=seed)
        helpful = alignment_data(world, harmful=False, seed=seed)
        held_out = alignment_data(world, harmful=True, n=args.data.eval_examples, part="validation")
        data = (safety, helpful, held_out, {})
    return assemble(args.model, training, args.data, data, name=MODEL_NAME), testbed


def discovery_options(args: Arguments) -> DiscoveryOptions:
    """What discovery takes from the trainer's options."""
    training = args.training
    return DiscoveryOptions(
        rank=args.model.lora_r,
        max_length=training.max_length or 1024,
        seed=training.seed,
        dtype=args.model.dtype or "float32",
        device="cuda" if torch.cuda.is_available() and not training.use_cpu else "cpu",
        revision=args.model.model_revision,
        trust_remote_code=training.trust_remote_code,
        progress=not training.disable_tqdm,
    )


def measure(
    trainer: SFTTrainer, source: Source, testbed: Testbed | None, args: Arguments, *, base: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Numbers of the model as it is now, and the judged responses they come from (on the testbed).

    Safety needs a judge: the testbed's oracle. Of other models only the held-out loss is measured here; their
    responses are for a judge of their own. The base model is the trained one without its adapter.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    with model.disable_adapter() if base else nullcontext():
        loss = trainer.evaluate()["eval_loss"]
        if not math.isfinite(loss):
            if base:
                raise InputError(f"the loss on held-out pairs is {loss} before training; try --dtype float32")
            raise InputError(
                f"the loss on held-out pairs is {loss}: training diverged; choose a smaller --learning_rate"
            )
        numbers: dict[str, Any] = {"held_out_loss": loss}
        if testbed is None:
            return numbers, []
        judged = respond(model, source.tokenizer, testbed.world, args.data.eval_examples)
    numbers |= {name: value.to_json() for name, value in summarize(judged).items()}
    label = "base" if base else "trained"
    return numbers, [{"model": label, **item.to_json()} for item in judged]


ROWS = {
    "safety_rate_in_distribution": "safety rate, trained categories (%)",
    "safety_rate_out_of_distribution": "safety rate, new categories (%)",
    "harmfulness": "harmfulness (1-5)",
    "over_refusal_rate": "over-refusal (%)",
    "correct_answer_rate": "correct benign answers (%)",
}


def show(metrics: dict[str, Any], output_dir: Path) -> None:
    """Print base against trained, and where things were written."""
    init = metrics["provenance"]["identity"]["init"]
    table = Table(title=f"Base model against {init} (95% intervals over prompts)")
    for heading in ("", "base", "trained"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, label in ROWS.items():
        if name in metrics["base"]:
            scale = 1.0 if name == "harmfulness" else 100.0
            cells = [_cell(Estimate(**metrics[model][name]), scale) for model in ("base", "trained")]
            table.add_row(label, *cells)
    table.add_row(
        "loss on held-out pairs", *(f"{metrics[model]['held_out_loss']:.3f}" for model in ("base", "trained"))
    )
    cost = metrics["cost"]
    share = f"{cost['trainable_parameters']:,} ({cost['trainable_share']:.2%})"
    table.add_row("trainable parameters", "0", share)
    seconds = cost["seconds"]
    table.add_row(
        "seconds", "", f"{sum(seconds.values()):.0f} (" + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()) + ")"
    )
    console = Console()
    console.print(table)
    console.print(f"adapter   {output_dir}/adapter_model.safetensors", highlight=False)
    if metrics["provenance"]["identity"]["subspace"] is not None:
        console.print(f"subspace  {output_dir}/subspace/", highlight=False)
    console.print(f"metrics   {output_dir}/metrics.json", highlight=False)


def _cell(estimate: Estimate, scale: float) -> str:
    if estimate.value is None:
        return f"unscored ({estimate.n_unscored})"
    low, high = estimate.ci_low or 0.0, estimate.ci_high or 0.0
    digits = 1 if scale == 100.0 else 2
    return f"{estimate.value * scale:.{digits}f} ({low * scale:.{digits}f} to {high * scale:.{digits}f})"


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _n_trainable(trainer: SFTTrainer) -> int:
    assert trainer.model is not None
    return sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)


def _n_parameters(trainer: SFTTrainer) -> int:
    assert trainer.model is not None
    return sum(parameter.numel() for parameter in trainer.model.parameters())
