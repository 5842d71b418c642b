"""Find the checkpoint that a training goes on from."""

from pathlib import Path

from transformers import TrainerState, TrainingArguments


def resumed_from(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint: the one that the arguments name, else that of the step in the output."""
    return Path(args.resume_from_checkpoint or f"{args.output_dir}/checkpoint-{state.global_step}")
