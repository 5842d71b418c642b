"""Mark checkpoints with the run that they belong to, and find the one to resume from.

<output_dir>/checkpoint-N/          TRL's checkpoint
<output_dir>/checkpoint-N/run.json  the identity of its run, and the size of each file; written last
"""

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
from sails_align.core.errors import InputError, first_line
from sails_align.core.files import write_json
from sails_align.training.dataset import TrainingSource
from sails_align.training.identity import different, run_identity
from sails_align.training.plan import TrainingPlan
from sails_align.training.save import add_to_adapter, frozen_adapter_weights

logger = logging.getLogger(__name__)


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
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
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
            write_json(folder / "run.json", {"identity": self.identity, "files": _sizes(folder)})


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file: a file that is shorter later is damaged."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run.json")
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _identity_in(checkpoint: Path) -> dict[str, Any] | None:
    """Return the identity in a checkpoint's `run.json`; None if the checkpoint is not complete."""
    mark = _read_json(checkpoint / "run.json")
    if not {"identity", "files"} <= mark.keys():
        return None
    found = _sizes(checkpoint)
    return mark["identity"] if all(found.get(name) == size for name, size in mark["files"].items()) else None


def _read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; an empty dict if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def find_checkpoint(args: TrainingArguments, identity: dict[str, Any]) -> str | None:
    """Find the checkpoint to resume from, in the main process.

    It is the last complete one in the output directory for `--resume_from_checkpoint true` (None if there is none yet),
    or the one named. Without the option, the checkpoints of a finished run of the same identity are deleted.

    Raises:
        InputError: if it is not a checkpoint, or one of another run; or without the option, if there are checkpoints of
            another run or of one that has not finished.
    """
    return from_main(lambda: _find_checkpoint(args, identity))


def _find_checkpoint(args: TrainingArguments, identity: dict[str, Any]) -> str | None:
    wanted = str(args.resume_from_checkpoint or "false")
    output_dir = Path(str(args.output_dir))
    if wanted.lower() == "false":
        _clear_checkpoints(output_dir, identity)
        return None
    checkpoint = Path(wanted) if wanted.lower() != "true" else _last_complete(output_dir)
    if checkpoint is None:
        logger.warning("%s has no checkpoint yet: training starts from the beginning", output_dir)
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
    if names := different(identity, of_checkpoint):
        raise InputError(
            f"cannot resume from {checkpoint}: it is of another run (different: {', '.join(names)});\n"
            "use the same options, another --output_dir, or leave --resume_from_checkpoint out"
        )
    return str(checkpoint)


def _clear_checkpoints(output_dir: Path, identity: dict[str, Any]) -> None:
    """Delete the checkpoints of an earlier run of the same identity, so that the new ones are kept.

    transformers keeps the checkpoints with the highest numbers, and would delete the new ones instead.
    """
    earlier = _checkpoints(output_dir)
    complete = [(path, found) for path in earlier if (found := _identity_in(path)) is not None]
    for path, found in complete:
        if different(identity, found):
            raise InputError(
                f"{output_dir} has checkpoints of another run, such as {path.name};\n"
                "choose another --output_dir, or delete them"
            )
    if complete and not (output_dir / "metrics.json").exists():
        raise InputError(
            f"{output_dir} has checkpoints of this run, which has not ended, such as {complete[-1][0].name};\n"
            "resume it with --resume_from_checkpoint true, or delete them to start again"
        )
    if earlier:
        logger.warning("starting again: %d checkpoints of the same run are deleted", len(earlier))
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


def check_folder(args: TrainingPlan, source: TrainingSource, output_dir: Path) -> None:
    """Refuse a folder that holds another run, before anything in it is changed.

    Raises:
        InputError: if it does.
    """
    identity = run_identity(args, source, None)  # by all processes: they hash the model together
    for name in ("subspace", "lora_target_modules", "lora_r", "lora_alpha", "lora_dropout"):
        del identity[name]  # decided later
    from_main(lambda: _check_folder(identity, output_dir))


def _check_folder(identity: dict[str, Any], output_dir: Path) -> None:
    record = _read_json(output_dir / "run.json")
    if record and (names := different(identity, record.get("identity", {}))):
        raise InputError(
            f"{output_dir} holds another run (different: {', '.join(names)});\n"
            "choose another --output_dir, or delete that one"
        )


def train(trainer: Trainer, checkpoint: str | None) -> None:
    """Train. If that fails while a checkpoint is being written, delete the part.

    Raises:
        InputError: if training cannot start, such as with a loss that TRL does not know.
    """
    if checkpoint is not None:
        done = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        if 0 < trainer.args.max_steps <= done:
            # transformers would train one more step. With no epochs left to train, it only loads the checkpoint.
            trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException as error:
        part = Path(str(trainer.args.output_dir)) / f"checkpoint-{trainer.state.global_step}"
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
