"""Which run a checkpoint is of, and going on from it; what is saved at the end.

<output_dir>/adapter_model.safetensors, adapter_config.json     the trained adapter, in PEFT's format
<output_dir>/model.safetensors, config.json                     or, of full fine-tuning, the model
<output_dir>/subspace/      the subspace the adapter started in
<output_dir>/run.json       the options, versions and hashes that made it
<output_dir>/metrics.json   what was measured
<output_dir>/checkpoint-N/  TRL's checkpoints, each with the run.json it belongs to
"""

import enum
import json
import logging
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, SFTConfig

from sails_align.core.artifacts import content_hash, tensors_hash
from sails_align.core.distributed import from_main, n_processes
from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.models.language_model import copy_processor
from sails_align.models.spec import identity_of
from sails_align.subspace.basis import Subspace
from sails_align.training.callbacks.options import DecayOptions
from sails_align.training.dataset import TrainingSource
from sails_align.training.plan import TrainingPlan
from sails_align.training.trainer import INITIAL_ADAPTER, PAIRS, AlignmentTrainer

logger = logging.getLogger(__name__)


OPTIMIZATION = (
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "bf16",
    "fp16",
)
DPO_LOSS = (
    "beta",
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "ld_alpha",
    "f_divergence_type",
    "use_weighting",
    "precompute_ref_log_probs",
    "truncation_mode",
)
"""Options that decide what is minimised and how; the number of steps may differ, to train for longer."""


def _as_json(value: Any) -> Any:
    return str(value) if isinstance(value, enum.Enum) else value


def run_identity(args: TrainingPlan, source: TrainingSource, subspace: Subspace | None) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this run's: resuming with anything else would mix two runs."""
    sails, training, model = args.sails, args.training, args.model
    identity = {
        "method": args.method,
        "model": source.identity(),
        "data": source.data_hash(),
        "subspace": None if subspace is None else subspace_hash(subspace),
        "init": args.start,
        "adapter": None if sails.adapter_path is None else identity_of(sails.adapter_path),
        "layer_map": sails.layer_map,
        "fold_norm": sails.fold_norm,
        "init_scale": sails.init_scale,
        "subspace_mode": sails.subspace_mode,
        "subspace_decay": args.of(DecayOptions).subspace_decay,
        "loss": args.loss,
        "lora_r": model.lora_r,
        "lora_alpha": model.lora_alpha,
        "lora_target_modules": model.lora_target_modules,
        "lora_dropout": model.lora_dropout,
        "use_rslora": model.use_rslora,
        "load_in_4bit": model.load_in_4bit,
        "load_in_8bit": model.load_in_8bit,
        "bnb_4bit_quant_type": model.bnb_4bit_quant_type,
        "use_bnb_nested_quant": model.use_bnb_nested_quant,
        "attn_implementation": model.attn_implementation,
        "learning_rate": training.learning_rate,
        "seed": training.seed,
        "engine": args.engine,
        "n_processes": n_processes(),
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "max_length": training.max_length,
        "chat_template": content_hash(source.tokenizer.chat_template),
        "dtype": model.dtype,
        **{name: _as_json(getattr(training, name)) for name in OPTIMIZATION},
    }
    if isinstance(training, DPOConfig):
        reference = args.dpo.ref_model_name_or_path
        identity |= {"reference": None if reference is None else identity_of(reference)}
        return identity | {name: getattr(training, name) for name in DPO_LOSS}
    names = ("packing", "packing_strategy", "completion_only_loss")
    return identity | {name: getattr(training, name) for name in names}


def subspace_hash(subspace: Subspace) -> str:
    """Content hash of a subspace's bases."""
    return tensors_hash(subspace.tensors())


class MarkCheckpoints(TrainerCallback):
    """Puts the run's identity into every checkpoint, so that another run cannot resume from it by mistake.

    It is written last, when every process has written its part: a checkpoint that has it is whole.
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
            assert folder.is_dir(), "it was just written, and those of earlier runs, which could push it out, are gone"
            _complete(folder, frozen)
            # TRL's copy of the adapter for DPO's reference is made anew when training resumes. If it were here,
            # transformers would load it and leave the trained adapter alone (`Trainer._load_from_checkpoint`).
            shutil.rmtree(folder / "ref", ignore_errors=True)
            write_json(folder / "run.json", {"identity": self.identity, "files": _sizes(folder)})


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file: what is shorter later on is damaged."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run.json")
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _read_mark(checkpoint: Path) -> dict[str, Any] | None:
    """What `MarkCheckpoints` wrote, if the checkpoint still has all of its files; None if it is not whole."""
    try:
        mark = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    if not isinstance(mark, dict) or not {"identity", "files"} <= mark.keys():
        return None
    found = _sizes(checkpoint)
    return mark if all(found.get(name) == size for name, size in mark["files"].items()) else None


def frozen_adapter_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Adapter weights that are not trained, where DeepSpeed ZeRO-3 leaves these out of what it saves.

    All processes must call it. Returns names as in PEFT's files -> values on the CPU; nothing under other engines.
    """
    frozen = {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name and ".default" in name and not parameter.requires_grad and _is_partitioned(parameter)
    }
    with gather_params_ctx(list(frozen.values()), modifier_rank=None):
        return {name: parameter.detach().cpu().clone() for name, parameter in frozen.items()}


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")  # how DeepSpeed marks them


def _complete(folder: Path, frozen: dict[str, torch.Tensor]) -> None:
    """Add weights to an adapter's file."""
    if frozen:
        path = folder / ADAPTER_WEIGHTS
        part = path.with_suffix(".part")
        save_file({**load_file(path), **frozen}, part, metadata={"format": "pt"})
        os.replace(part, path)


def find_checkpoint(training_args: SFTConfig | DPOConfig, identity: dict[str, Any]) -> str | None:
    """The checkpoint to resume from: the last whole one in the output directory for `--resume_from_checkpoint true`
    (None if there is none yet), or the one named. The main process looks for all.

    Raises:
        InputError: if it is not a checkpoint, or one of another run.
    """
    return from_main(lambda: _find_checkpoint(training_args, identity))


def _find_checkpoint(training_args: SFTConfig | DPOConfig, identity: dict[str, Any]) -> str | None:
    wanted = training_args.resume_from_checkpoint
    output_dir = Path(str(training_args.output_dir))
    if not wanted or wanted.lower() == "false":
        _clear_checkpoints(output_dir, identity)
        return None
    if wanted.lower() == "true":
        found = _last_whole_checkpoint(output_dir)
        if found is None:
            logger.warning("%s has no checkpoint yet: training starts from the beginning", output_dir)
            return None
    else:
        found = wanted
    mark = _read_mark(Path(found))
    if mark is None and _checkpoints(Path(found)):
        raise InputError(
            f"cannot resume from {found}: that is a whole run;\ngive one of its checkpoints, such as "
            f"{_checkpoints(Path(found))[-1]}, or --resume_from_checkpoint true for the last one in --output_dir"
        )
    if mark is None:
        raise InputError(
            f"cannot resume from {found}: it is no whole checkpoint (run.json, or a file that it lists, is missing or "
            "damaged);\ngive a whole checkpoint of this run, or leave --resume_from_checkpoint out"
        )
    different = _different(identity, mark["identity"])
    if different:
        raise InputError(
            f"cannot resume from {found}: it is of another run (different: {', '.join(different)});\n"
            "use the same options, another --output_dir, or leave --resume_from_checkpoint out"
        )
    return found


def _clear_checkpoints(output_dir: Path, identity: dict[str, Any]) -> None:
    """Before a fresh start, delete the checkpoints of the same run once it has ended: transformers keeps those with the
    highest numbers, and would delete the new ones instead.

    Raises:
        InputError: if there are checkpoints of another run, or this one has not ended. Nothing is deleted then.
    """
    earlier = _checkpoints(output_dir)
    whole = [(path, mark) for path in earlier if (mark := _read_mark(path)) is not None]
    for path, mark in whole:
        if _different(identity, mark["identity"]):
            raise InputError(
                f"{output_dir} has checkpoints of another run, such as {path.name};\n"
                "choose another --output_dir, or delete them"
            )
    if whole and not (output_dir / "metrics.json").exists():
        raise InputError(
            f"{output_dir} has checkpoints of this run, which has not ended, such as {whole[-1][0].name};\n"
            "go on with --resume_from_checkpoint true, or delete them to start afresh"
        )
    if earlier:
        logger.warning("starting afresh: %d checkpoints of the same run are deleted", len(earlier))
    for path in earlier:
        shutil.rmtree(path)


def _last_whole_checkpoint(output_dir: Path) -> str | None:
    """The last checkpoint with a `run.json`, which is written last: a process killed while it wrote one leaves a part.

    transformers' `get_last_checkpoint` would take the part.
    """
    for path in reversed(_checkpoints(output_dir)):
        if _read_mark(path) is not None:
            return str(path)
        logger.warning("%s is not whole: it is passed over", path)
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    """In the order of their steps."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _different(identity: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in identity if content_hash(identity[name]) != content_hash(other.get(name))]


def check_folder(args: TrainingPlan, source: TrainingSource, output_dir: Path) -> None:
    """Refuse a folder that holds another run, before anything in it is changed.

    Raises:
        InputError: then.
    """
    identity = run_identity(args, source, None)  # by all processes: they hash the model together
    from_main(lambda: _check_folder(identity, output_dir))


def _check_folder(identity: dict[str, Any], output_dir: Path) -> None:
    try:
        record = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return
    other = record.get("identity", {}) if isinstance(record, dict) else {}
    later = ("subspace", "lora_target_modules", "lora_r", "lora_alpha", "lora_dropout")  # settled when these are known
    different = [name for name in _different(identity, other) if name not in later]
    if different:
        raise InputError(
            f"{output_dir} holds another run (different: {', '.join(different)});\n"
            "choose another --output_dir, or delete that one"
        )


def train(trainer: AlignmentTrainer, checkpoint: str | None) -> None:
    """Train. If that ends in an error while a checkpoint is being written, the part of it goes.

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
        if trainer.state.global_step == 0 and _is_of_options(error):
            raise InputError(_start_message(error)) from error
        raise


def _is_of_options(error: BaseException) -> bool:
    """Whether an error is one that transformers, TRL or a reporting service raises for options it cannot use."""
    if isinstance(error, InputError | OSError | AssertionError) or not isinstance(error, Exception):
        return False
    return isinstance(error, NotImplementedError) or not isinstance(error, RuntimeError)


def _start_message(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    cause = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return (
        f"training cannot start: {cause}\n({type(error).__name__} in {last.filename}, line {last.lineno}); "
        "change the option it is about, or report it if it is about none"
    )


@contextmanager
def saved_whole(trainer: Trainer, output_dir: Path) -> Iterator[Path]:
    """Save the model, its tokenizer and the trainer's options in a folder for the block to complete; then each file
    takes its place in the output folder as a whole. Every process takes part, and only the main one moves files."""
    part = output_dir / ".model"
    try:
        trainer.save_model(str(part), _internal_call=True)  # by all processes; else TRL would push it to the hub
        yield part
        if trainer.is_world_process_zero():
            for file in _files(part):
                file.chmod(0o644)  # safetensors makes it private
                os.replace(file, output_dir / file.name)
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(part, ignore_errors=True)


def save_model(args: TrainingPlan, trainer: AlignmentTrainer, output_dir: Path) -> None:
    """Write the adapter (or the fine-tuned model), the tokenizer and the trainer's options, each file as a whole. What
    only training needed is deleted.

    An adapter whose initialisation changed the base weights is written as the change since then: a plain LoRA adapter
    of twice the rank, for the untouched base.
    """
    with saved_whole(trainer, output_dir) as part:
        frozen = frozen_adapter_weights(_unwrapped(trainer))
        if trainer.is_world_process_zero():
            assert any(part.glob("*.safetensors")), "engines that save no whole weights are refused with the options"
            _complete(part, frozen)
            if not args.model.use_peft:
                model: Any = _unwrapped(trainer)
                copy_processor(str(args.model.model_name_or_path), model.config, part, args.model.model_revision)
            if args.sails.initializer.changes_base:
                _subtract_initial_adapter(trainer, output_dir, part)
    if trainer.is_world_process_zero():
        shutil.rmtree(output_dir / PAIRS, ignore_errors=True)


def _unwrapped(trainer: AlignmentTrainer) -> nn.Module:
    model: Any = trainer.model
    unwrapped: Any = trainer.accelerator.unwrap_model(model)
    return unwrapped


def _files(folder: Path) -> Iterator[Path]:
    """Without TRL's copy of the adapter, which is in a folder of its own."""
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def _subtract_initial_adapter(trainer: AlignmentTrainer, output_dir: Path, part: Path) -> None:
    model = _unwrapped(trainer)
    assert isinstance(model, PeftModel)
    initial = output_dir / INITIAL_ADAPTER
    model.save_pretrained(
        str(part), selected_adapters=["default"], path_initial_model_for_weight_conversion=str(initial)
    )
    shutil.rmtree(initial)
