"""The commands `sails train sft` and `sails train dpo`: SAE features -> safety subspace -> adapters -> TRL's trainers.

sails train sft                       the testbed
sails train dpo --config FILE.yaml    anything else
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from sails_align.core.artifacts import package_versions
from sails_align.core.command_line import CommandLine
from sails_align.core.cost import Cost, peak_memory_mb
from sails_align.core.distributed import check_devices, plain_cpu
from sails_align.core.errors import InputError
from sails_align.core.files import disk_errors, work_folder, write_json, write_text
from sails_align.core.log import Stages, is_main, log_file, say, show
from sails_align.core.options import OutputOptions
from sails_align.core.trackers import hide_command_line
from sails_align.data.pairs import fingerprint
from sails_align.export.card import write_card
from sails_align.export.hub import push
from sails_align.models.adapters import check_complete
from sails_align.models.parameters import count_parameters
from sails_align.models.spec import stem_of
from sails_align.models.threads import fitting_threads
from sails_align.subspace.basis import Subspace
from sails_align.subspace.options import DPOOptions, Method
from sails_align.training.callbacks.frozen import count_frozen
from sails_align.training.callbacks.reporting import reported
from sails_align.training.checkpoints import MarkCheckpoints, find_checkpoint, train
from sails_align.training.checks import check_machine, check_options
from sails_align.training.dataset import TrainingSource, load_source
from sails_align.training.defaults import Trained, defaults_of, resolved
from sails_align.training.earlier import check_folder
from sails_align.training.identity import run_identity
from sails_align.training.measure import MeasureStart, learning_curve, measure, measure_while_training
from sails_align.training.options import MeasureOptions, own_options
from sails_align.training.plan import TrainingPlan, changed
from sails_align.training.record import write_record
from sails_align.training.save import save_model
from sails_align.training.stages import (
    data_line,
    model_line,
    say_data,
    say_start,
    say_subspace,
    stages_of,
    subspace_line,
    training_line,
)
from sails_align.training.subspace import find_subspace
from sails_align.training.table import show_changes
from sails_align.training.tracking import send_responses
from sails_align.training.trainer import AlignmentTrainer, build_trainer, left_out
from sails_align.training.units import check_units
from sails_align.training.zeroth_order.options import DEFAULTS as ZEROTH_ORDER


def parse(method: Method, argv: Sequence[str] | None = None, prog: str | None = None) -> TrainingPlan:
    """Read the command line (None: this process's) and `--config` (YAML); `prog` is what `--help` calls the command.

    Raises `InputError` for an unknown option, a value that cannot be used, or options that contradict each other.
    """
    line = CommandLine.read(argv)
    model_name = line.value("model_name_or_path")
    trained: Trained = "new" if line.value("adapter_path") is None else "trained"
    if not line.flag("use_peft", default=True):
        trained = "full"
    defaults = defaults_of(model_name, method, trained)
    if not torch.cuda.is_available():
        defaults |= {"use_cpu": True, "bf16": False}
    if line.flag("zeroth_order", default=False):
        defaults |= ZEROTH_ORDER
    check_devices(line.flag("use_cpu", default=False))
    if method == "dpo" and line.value("packing") is not None:
        raise InputError("packing is given, but TRL packs examples of SFT only; leave it out")
    config_class = SFTConfig if method == "sft" else DPOConfig
    classes = [*own_options(method), ScriptArguments, config_class, ModelConfig]
    *own, script, training, model = line.parse(classes, defaults=defaults, prog=prog)
    dpo = own.pop() if method == "dpo" else DPOOptions()
    sails, data, *extras = own
    if model.use_peft and sails.init is None and sails.adapter_path is None:
        sails = sails.replaced(init="sails")
    given = line.given(classes)
    plan = TrainingPlan(method, sails, data, tuple(extras), script, training, model, dpo, defaults, given)
    check_options(plan)
    plain_cpu(training)
    if training.output_dir in (None, "trainer_output"):
        name = f"{method}-{plan.start}-{stem_of(model_name or 'testbed')}"
        plan = replace(plan, training=changed(training, output_dir=f"runs/{name}"))
    hide_command_line()
    if training.report_to and training.run_name is None:  # without a name, trackio makes several runs of one training
        name = f"{Path(str(plan.training.output_dir)).name}-{datetime.now():%m%d-%H%M%S}"
        plan = replace(plan, training=changed(plan.training, run_name=name))
    return plan


def main(method: Method, argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, build, train, save. Returns what is in `metrics.json`."""
    args = parse(method, argv, prog)
    folder = Path(str(args.training.output_dir))
    # Of several processes only one makes the folder, so that it can remove it again if all of them fail.
    opened = work_folder(folder) if is_main() else nullcontext()
    with opened, log_file(folder, f"sails train {method}"), Stages(stages_of(args)) as stages:
        return run(args, folder, stages)


def run(args: TrainingPlan, output_dir: Path, stages: Stages) -> dict[str, Any]:
    """Build, train and save in a folder. Returns what is in `metrics.json`."""
    cost = Cost()
    say_start(args, output_dir)
    stages.begin("model", model_line(args))
    with cost.of("prepare"), args.training.main_process_first(local=True, desc="loading the data"):
        args, testbed = resolved(args)
        stages.begin("data", data_line(args))
        source = load_source(args, testbed)
    say_data(source)
    check_machine(args, source.model_config)
    check_units(args, source)
    if (finished := check_folder(args, source, output_dir)) is not None:
        if args.training.push_to_hub and is_main():
            finish(args, source, output_dir)
        return finished
    subspace = _subspace(args, source, output_dir, stages, cost) if args.sails.uses_subspace else None
    stages.begin("adapter" if args.model.use_peft else "weights", args.start)
    with cost.of("prepare"), disk_errors(output_dir):
        built = build_trainer(args, source, subspace)
        args, trainer = built.plan, built.trainer
        identity, overwrite = run_identity(args, source, subspace), args.of(OutputOptions).overwrite_output_dir
        checkpoint = find_checkpoint(args.training, identity, overwrite=overwrite)
        trainer.add_callback(MarkCheckpoints(identity))
        if trainer.is_world_process_zero():
            record = _record(args, identity, source, subspace) | {"start": built.start}
            write_record(output_dir, args.method, {**args.defaults, **args.given}, record)

    def measured(label: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        with cost.of("evaluate"):
            return measure(trainer, source, testbed, args, label)

    start = MeasureStart(lambda: measured("base"), output_dir, identity)
    n_trainable, n_parameters = _say_sizes(trainer)
    stages.begin("training", training_line(trainer, checkpoint))
    with cost.of("train"), disk_errors(output_dir):
        trainer.add_callback(start)
        if (every := args.of(MeasureOptions).measure_steps) is not None:
            measure_while_training(trainer, every, lambda: measured("in training"))
        train(trainer, checkpoint)
        trainer.remove_callback(start)
        save_model(args, trainer, output_dir)
    stages.begin("evaluation", "held-out loss" if testbed is None else "held-out loss, and the oracle's verdicts")
    with fitting_threads(trainer.model):  # pyright: ignore[reportArgumentType] -- it has one
        trained, responses = measured("trained")
    metrics = {
        "base": start.base,
        "trained": trained,
        "provenance": {
            "identity": identity,
            "options": args.to_json(),
            "dropped_rows": source.dropped,
            "longer_than_max_length": left_out(trainer, source),
            "saes": None if subspace is None else subspace.provenance.get("saes"),
            "versions": package_versions(),
        },
        "cost": _cost(cost, n_trainable - count_frozen(trainer), n_parameters),
    }
    metrics |= last_drift(trainer.state.log_history) | reported(trainer)
    if every is not None:
        metrics["learning_curve"] = learning_curve(trainer.state.log_history)
    if trainer.is_world_process_zero():
        if testbed is not None:
            rows = "".join(json.dumps(row) + "\n" for row in start.responses + responses)
            write_text(output_dir / "responses.jsonl", rows)
        write_json(output_dir / "metrics.json", metrics)
        send_responses(trainer, start.responses + responses)
        show_changes(f"{args.method.upper()}, {args.start}", metrics, output_dir)
        finish(args, source, output_dir)
    return metrics


def _subspace(args: TrainingPlan, source: TrainingSource, output_dir: Path, stages: Stages, cost: Cost) -> Subspace:
    stages.begin("subspace", subspace_line(args))
    with cost.of("subspace"):
        subspace = find_subspace(args, source, output_dir / "subspace")
    say_subspace(subspace)
    return subspace


def _say_sizes(trainer: AlignmentTrainer) -> tuple[int, int]:
    assert trainer.model is not None
    n_trainable, n_parameters = count_parameters(trainer.model)
    say(f"    {n_trainable:,} of {n_parameters:,} parameters train ({n_trainable / n_parameters:.2%})")
    return n_trainable, n_parameters


def _cost(cost: Cost, n_trainable: int, n_parameters: int) -> dict[str, Any]:
    return {
        "seconds": cost.seconds,
        "trainable_parameters": n_trainable,
        "trainable_share": n_trainable / n_parameters,
        "peak_memory_mb": round(peak_memory_mb(), 1),
    }


def _record(
    args: TrainingPlan, identity: dict[str, Any], source: TrainingSource, subspace: Subspace | None
) -> dict[str, Any]:
    """Return what `run.json` says of the run."""
    data = {
        "safety": {"name": args.script.dataset_name, "rows": len(source.safety)},
        "helpful": {"name": args.data.helpful_dataset_name, "rows": len(source.helpful or ())},
        "train": {"rows": len(source.train), "sha256": source.data_hash()},
        "held_out": {"rows": len(source.held_out), "sha256": fingerprint(source.held_out)},
        "dropped_rows": source.dropped,
        "rows_paired_as_rejected": source.n_paired,
        "examples_with_special_tokens": source.n_quoting,
        "prefilled_examples": source.prefilled(),
    }
    saes = None if subspace is None else subspace.provenance.get("saes")
    return {"identity": identity, "options": args.to_json(), "data": data, "saes": saes, "end": asdict(source.end)}


def last_drift(logs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the last logged drift of the adapter (see `DriftCallback`) as `drift`; empty without a subspace."""
    rows = [{name: value for name, value in row.items() if name.startswith("adapter_")} for row in logs]
    return next(({"drift": row} for row in reversed(rows) if row), {})


def finish(args: TrainingPlan, source: TrainingSource, output_dir: Path) -> None:
    """Check that the saved adapter is complete, write the model card, and push all to the hub if asked to."""
    if args.model.use_peft:
        check_complete(output_dir, source.model_config)
    show(f"card      {write_card(output_dir, output_dir)}")
    training = args.training
    if training.push_to_hub:
        address = push(
            output_dir,
            training.hub_model_id or output_dir.name,
            private=training.hub_private_repo,
            revision=training.hub_revision,
            token=training.hub_token,
        )
        show(f"hub       {address}")
