"""Mark checkpoints with the run that they belong to, and find the one to resume from.

<output_dir>/checkpoint-N/          TRL's checkpoint
<output_dir>/checkpoint-N/run.json  the identity of its run, and a digest of each file; written last
"""

import hashlib
import json
import logging
import shutil
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sails_align.core.distributed import from_main, n_processes
from sails_align.core.earlier import REMEDY
from sails_align.core.errors import InputError, first_line
from sails_align.core.files import read_record, write_json
from sails_align.core.log import say
from sails_align.core.options import listed
from sails_align.models.threads import fitting_threads
from sails_align.training.callbacks.resumed import checkpoint_of
from sails_align.training.earlier import METRICS_FILE, clear
from sails_align.training.identity import differences
from sails_align.training.save import add_to_adapter, frozen_adapter_weights
from sails_align.training.step_log import log_steps

logger = logging.getLogger(__name__)


SAMPLE, N_SAMPLES = 2**20, 64
"""Bytes of a sample of a large file, and how many are taken."""


class MarkCheckpoints(TrainerCallback):
    """Write `run.json` into every checkpoint, so that another run cannot resume from it by mistake.

    It is written last, when every process has written its part: a checkpoint that has it is complete.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity = identity

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Complete the checkpoint just saved and write its `run.json`."""
        folder = checkpoint_of(args, state)
        frozen = frozen_adapter_weights(model)
        if n_processes() > 1:
            dist.barrier()
        if state.is_world_process_zero:
            assert folder.is_dir(), (
                "it was just written, and checkpoints of earlier runs, which could replace it, are gone"
            )
            add_to_adapter(folder, frozen)
            # TRL's copy of the adapter for DPO's reference is made anew when training resumes. If it were here,
            # transformers would load it and leave the trained adapter alone (`Trainer._load_from_checkpoint`).
            shutil.rmtree(folder / "ref", ignore_errors=True)
            write_json(folder / "run.json", {"identity": self.identity, "files": _digests(folder)})


def _digests(folder: Path) -> dict[str, str]:
    """Return a digest of each file: one that was cut short, or is of zeros after a crash, is damaged."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run.json")
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def _digest(path: Path) -> str:
    """Hash a file's size and its content; of a large one, samples, since optimizer states have many gigabytes."""
    size = path.stat().st_size
    step = max(SAMPLE, size // N_SAMPLES)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for place in (*range(0, size, step), max(0, size - SAMPLE)):
            file.seek(place)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _identity_in(checkpoint: Path) -> dict[str, Any] | None:
    """Return the identity in a checkpoint's `run.json`; None if the checkpoint is not complete."""
    mark = read_record(checkpoint / "run.json")
    identity, files = mark.get("identity"), mark.get("files")
    if not isinstance(identity, dict) or not isinstance(files, dict):
        return None
    try:
        is_whole = all(_digest(checkpoint / name) == digest for name, digest in files.items())
    except OSError:  # one is missing, or cannot be read
        return None
    return identity if is_whole else None


def find_checkpoint(args: TrainingArguments, identity: dict[str, Any], *, overwrite: bool = False) -> str | None:
    """Find the checkpoint to resume from, in the main process.

    It is the last complete one in the output directory for `--resume_from_checkpoint true` (None if there is none yet),
    or the one named. Without the option, the checkpoints of a finished run of the same identity are deleted; with
    `overwrite`, any run in the folder is, unless it is resumed. Raises `InputError` if it is not a checkpoint, or one
    of another run; or without the option, if there are checkpoints of another run or of one that has not finished.
    """
    return from_main(lambda: _find_checkpoint(args, identity, overwrite))


def _find_checkpoint(args: TrainingArguments, identity: dict[str, Any], overwrite: bool) -> str | None:
    wanted = str(args.resume_from_checkpoint or "false")
    output_dir = Path(str(args.output_dir))
    if wanted.lower() == "false":
        clear(output_dir) if overwrite else _clear_checkpoints(output_dir, identity)
        return None
    checkpoint = Path(wanted) if wanted.lower() != "true" else _last_complete(output_dir)
    if checkpoint is None:
        if overwrite:
            clear(output_dir)
        say(f"{output_dir} has no complete checkpoint: training starts from the beginning")
        return None
    of_checkpoint = _identity_in(checkpoint)
    if of_checkpoint is None and (within := _checkpoints(checkpoint)):
        raise InputError(
            f"cannot resume from {checkpoint}: that is a whole run;\ngive one of its checkpoints, such as "
            f"{within[-1]}, or --resume_from_checkpoint true for the last one in --output_dir"
        )
    if of_checkpoint is None:
        raise InputError(
            f"cannot resume from {checkpoint}: it is not a complete checkpoint (run.json, or a file that it lists, is "
            "missing or damaged);\ngive a complete checkpoint of this run, or leave --resume_from_checkpoint out"
        )
    if found := differences(identity, of_checkpoint):
        if overwrite and wanted.lower() == "true":
            clear(output_dir)
            return None
        raise InputError(
            f"cannot resume from {checkpoint}: it is of another run (different: {listed(found)});\n"
            "use the same options, another --output_dir, or leave --resume_from_checkpoint out"
        )
    return str(checkpoint)


def _clear_checkpoints(output_dir: Path, identity: dict[str, Any]) -> None:
    """Delete the checkpoints of an earlier run of the same identity, so that the new ones are kept.

    transformers keeps the checkpoints with the highest numbers, and would delete the new ones instead.
    """
    earlier = _checkpoints(output_dir)
    complete = [(path, found) for path in earlier if (found := _identity_in(path)) is not None]
    for path, of_checkpoint in complete:
        if found := differences(identity, of_checkpoint):
            raise InputError(
                f"{output_dir} has checkpoints of another run, such as {path.name} (different: {listed(found)});\n"
                f"{REMEDY}"
            )
    if complete and not (output_dir / METRICS_FILE).exists():
        raise InputError(
            f"{output_dir} has checkpoints of this run, which is not finished, such as {complete[-1][0].name};\n"
            "resume it with --resume_from_checkpoint true, or start again with --overwrite_output_dir true"
        )
    if earlier:
        say(f"starting again: {len(earlier)} checkpoints of the same run are deleted")
    for path in earlier:
        shutil.rmtree(path)


def _last_complete(output_dir: Path) -> Path | None:
    """Find the last complete checkpoint: a process killed while it wrote one leaves a part.

    transformers' `get_last_checkpoint` would take the part.
    """
    for path in reversed(_checkpoints(output_dir)):
        if _identity_in(path) is not None:
            return path
        logger.warning("%s is not complete: it is skipped", path)
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints of a run in the order of their steps."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def train(trainer: Trainer, checkpoint: str | None) -> None:
    """Train. If that fails while a checkpoint is being written, delete the part.

    Raises `InputError` if training cannot start, such as with a loss that TRL does not know.
    """
    if checkpoint is not None:
        done = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        if 0 < trainer.args.max_steps <= done:
            # transformers would train one more step. With no epochs left to train, it only loads the checkpoint.
            trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    trainer.args.resume_from_checkpoint = checkpoint  # for callbacks that keep something in checkpoints
    steps = log_steps(trainer)
    try:
        with fitting_threads(trainer.model):  # pyright: ignore[reportArgumentType] -- it has one
            trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException as error:
        steps.stop()
        part = checkpoint_of(trainer.args, trainer.state)
        if trainer.is_world_process_zero() and not (part / "run.json").exists():  # written last, by `MarkCheckpoints`
            shutil.rmtree(part, ignore_errors=True)
        if trainer.state.global_step == 0 and _is_about_options(error):
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} in {last.filename}, line {last.lineno}"
            raise InputError(
                f"training cannot start: {first_line(error)}\n({place}); "
                "change the option that this is about, or report the error"
            ) from error
        raise


def _is_about_options(error: BaseException) -> bool:
    """Return whether transformers, TRL or a reporting service raises such an error for options that it cannot use."""
    if isinstance(error, NotImplementedError):  # a RuntimeError
        return True
    return isinstance(error, Exception) and not isinstance(error, InputError | OSError | AssertionError | RuntimeError)
