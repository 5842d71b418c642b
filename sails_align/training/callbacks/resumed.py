"""Find a checkpoint of a training: the one that is written, or the one that it goes on from; and read its files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from sails_align.core.errors import InputError, first_line

T = TypeVar("T")


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint of a step in the output."""
    return Path(f"{args.output_dir}/checkpoint-{state.global_step}")


def resumed_from(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint: the one that the arguments name, else that of the step in the output."""
    return Path(args.resume_from_checkpoint or checkpoint_of(args, state))


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Read tensors of a checkpoint; raise `InputError` ("cannot resume WHAT") if the file is missing or damaged."""
    return _read(path, what, load_file)


def read_values(path: Path, what: str) -> dict[str, Any]:
    """Read JSON of a checkpoint; raise `InputError` ("cannot resume WHAT") if the file is missing or damaged."""
    return _read(path, what, lambda file: dict(json.loads(file.read_text(encoding="utf-8"))))


def _read(path: Path, what: str, read: Callable[[Path], T]) -> T:
    if not path.is_file():
        raise InputError(f"cannot resume {what}: there is no {path};\ncopy the checkpoint again, or start again")
    try:
        return read(path)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(
            f"cannot resume {what}: {path} is damaged ({first_line(error)});\ncopy the checkpoint again, or start again"
        ) from error
