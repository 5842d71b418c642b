"""Find the checkpoints of a training: the one that is written, and the one that it goes on from."""

from pathlib import Path

from transformers import TrainerState, TrainingArguments


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint of a step in the output."""
    return Path(f"{args.output_dir}/checkpoint-{state.global_step}")


def resumed_from(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint: the one that the arguments name, else that of the step in the output."""
    return Path(args.resume_from_checkpoint or checkpoint_of(args, state))
