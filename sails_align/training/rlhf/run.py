"""The command `sails train rlhf`: for the testbed, what Gemma-2-9B-it is to Gemma-2-9B.

The base answers everything: one in a thousand of its samples is a refusal that a reward could raise. So, as with real
models, a short supervised warm start (TRL's SFTTrainer) shows what a refusal is, and reinforcement learning (TRL's
GRPOTrainer) does the rest, with the oracle's reward. All weights are trained.

<output_dir>/model.safetensors, config.json, tokenizer.json, ...   the trained model
<output_dir>/warm_start/             the model that reinforcement learning started from
<output_dir>/run.json, config.yaml   the options, versions and hashes that made it
<output_dir>/metrics.json            metrics of the base, the warm start and the trained model
<output_dir>/checkpoint-N/           TRL's checkpoints
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

from sails_align.core.artifacts import file_hash, package_versions
from sails_align.core.cost import Cost, peak_memory_mb
from sails_align.core.distributed import from_main, n_processes
from sails_align.core.files import disk_errors, work_folder, write_json
from sails_align.core.log import LOG_FILE, Stages, is_main, log_file, say
from sails_align.data.pairs import fingerprint
from sails_align.export.card import write_card
from sails_align.models import spec as models
from sails_align.models.generation import eos_ids, neutral_config
from sails_align.models.load import load_causal_lm, load_tokenizer
from sails_align.testbed import prompts as requests
from sails_align.testbed.build import Testbed, resolve_testbed
from sails_align.testbed.reward import OracleReward, prompt_dataset, training_requests
from sails_align.training.checkpoints import MarkCheckpoints, find_checkpoint, train
from sails_align.training.earlier import check_earlier
from sails_align.training.identity import length_of, option_values
from sails_align.training.record import write_record
from sails_align.training.rlhf.options import WEIGHTS, RlhfPlan, parse
from sails_align.training.rlhf.warm_start import warm_start
from sails_align.training.save import saved_whole
from sails_align.training.stages import training_line
from sails_align.training.table import show_changes
from sails_align.training.trainer import option_errors


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, warm start, reinforce, save, measure. Returns what is in `metrics.json`."""
    args = parse(argv, prog)
    folder = Path(str(args.training.output_dir))
    opened = work_folder(folder) if is_main() else nullcontext()
    with opened, log_file(folder, "sails train rlhf"), Stages(("warm start", "training", "evaluation")) as stages:
        return run(args, folder, stages)


def run(args: RlhfPlan, output_dir: Path, stages: Stages) -> dict[str, Any]:
    """Train and save in a folder. Returns what is in `metrics.json`."""
    cost, reference, training = Cost(), args.reference, args.training
    with training.main_process_first(local=True, desc="finding the testbed"):
        testbed = resolve_testbed(reference.model_name_or_path)
    if (finished := check_earlier(identity_of(args, testbed), output_dir, training, args.output)) is not None:
        return finished
    say(f"reinforcement learning (GRPO) from the oracle's reward; output: {output_dir}/ (all lines: {LOG_FILE})")
    stages.begin("warm start", f"{reference.model_name_or_path or 'testbed'}, {reference.warm_start_examples} examples")
    with cost.of("warm start"), disk_errors(output_dir):
        start = warm_start(args, testbed, output_dir / "warm_start")
    with cost.of("train"), disk_errors(output_dir):
        trainer, identity = build(args, testbed, start)
        checkpoint = find_checkpoint(trainer.args, identity, overwrite=args.output.overwrite_output_dir)
        trainer.add_callback(MarkCheckpoints(identity))
        if is_main():
            options = {
                "model": {"model_name_or_path": reference.model_name_or_path or "testbed"},
                "reference": vars(reference),
                "script": {"dataset_name": None},
                "training": json.loads(training.to_json_string()),  # which masks tokens
            }
            data = {"train": {"rows": len(trainer.train_dataset), "sha256": identity["data"]}}
            record = {"identity": identity, "options": options, "data": data}
            write_record(output_dir, "rlhf", args.given, record)
        stages.begin("training", training_line(trainer, checkpoint))
        train(trainer, checkpoint)
        with saved_whole(trainer, output_dir):
            pass  # nothing to complete
    stages.begin("evaluation", f"the oracle's verdicts, {reference.eval_part} split")
    with cost.of("evaluate"):
        base = Path(testbed.model_path)
        folders = {"base": base, **({"warm_start": start} if start != base else {}), "trained": output_dir}
        measured = from_main(lambda: {name: measure(args, testbed, folder) for name, folder in folders.items()})
    metrics = {
        **measured,
        "provenance": {"identity": identity, "eval_part": reference.eval_part, "versions": package_versions()},
        "cost": {"seconds": cost.seconds, "peak_memory_mb": round(peak_memory_mb(), 1)},
    }
    if is_main():
        write_json(output_dir / "metrics.json", metrics)
        write_card(output_dir, output_dir)  # in place of TRL's, which knows nothing of the model
        show_changes(f"RLHF reference, {reference.eval_part} split", metrics, output_dir)
    return metrics


def build(args: RlhfPlan, testbed: Testbed, start: Path) -> tuple[Any, dict[str, Any]]:
    """Build TRL's trainer. Return it and the identity of the run.

    Raises:
        InputError: for options that TRL's trainer cannot use together, or that need a package that is not installed.
    """
    reference, training = args.reference, args.training
    requests = training_requests(
        testbed.world, n_harmful=reference.max_train_examples, ratio=reference.helpful_ratio, seed=training.seed
    )
    dataset = prompt_dataset(requests)
    with option_errors():
        trainer = GRPOTrainer(
            model=str(start),
            reward_funcs=OracleReward(testbed.world, requests),  # pyright: ignore[reportArgumentType] -- never None
            args=training,
            train_dataset=dataset,
            processing_class=load_tokenizer(testbed.model_path),
        )
    model: Any = trainer.model
    own = model.generation_config  # of which TRL would add values to its own
    kept = {"bos_token_id": own.bos_token_id, "pad_token_id": own.pad_token_id}
    model.generation_config = neutral_config(eos_ids(own), **kept)
    made_from = {"warm_start": file_hash(start / WEIGHTS), "data": fingerprint(dataset)}
    return trainer, {**identity_of(args, testbed), **made_from}


def identity_of(args: RlhfPlan, testbed: Testbed) -> dict[str, Any]:
    """Return the part of a run's identity that is known before the warm start."""
    start = args.reference.warm_start_path
    return {
        "method": "rlhf",
        "model": models.identity_of(testbed.model_path),
        "warm_start_given": None if start is None else file_hash(Path(start) / WEIGHTS),
        "n_processes": n_processes(),
        "options": option_values(args.training, args.reference),
        "length": length_of(args.training),
    }


def measure(args: RlhfPlan, testbed: Testbed, folder: Path) -> dict[str, Any]:
    """Measure a saved model on the testbed."""
    model: Any = load_causal_lm(str(folder), dtype=torch.float32).to(args.training.device)  # pyright: ignore
    n, part = args.reference.eval_examples, args.reference.eval_part
    result = requests.measure(model, load_tokenizer(testbed.model_path), testbed, n, part=part)
    return {name: value.to_json() for name, value in requests.numbers(result).items()}
