"""Options -> a TRL trainer whose adapter starts in the subspace -> a run directory.

<output_dir>/adapter_model.safetensors, adapter_config.json     the trained adapter, in PEFT's format
<output_dir>/subspace/      the subspace it started in
<output_dir>/run.json       the options, versions and hashes that made it
<output_dir>/metrics.json   what was measured
<output_dir>/checkpoint-N/  TRL's checkpoints, each with the run.json it belongs to
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from sails_align.artifacts import content_hash, tensors_hash, write_json
from sails_align.config import SailsArguments
from sails_align.data import to_sft
from sails_align.errors import InputError
from sails_align.loading import cache_errors
from sails_align.subspace.adapter import AdapterInit, initialize_adapter
from sails_align.subspace.basis import Subspace
from sails_align.subspace.targets import target_modules_for
from sails_align.subspace.truncated import exact_attention, model_errors
from sails_align.training.callbacks import DriftCallback, SubspaceDecay, add_first
from sails_align.training.source import Source

logger = logging.getLogger(__name__)

DEFAULT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
"""With rank 16 these are 0.19% of Gemma-2-9B's parameters and 0.24% of 2B's: the shares the paper reports."""


def build_sft_trainer(
    sails_args: SailsArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    source: Source,
    subspace: Subspace | None,
    callbacks: list[TrainerCallback] | None = None,
) -> tuple[SFTTrainer, AdapterInit | None]:
    """A TRL trainer with a LoRA adapter that starts in the subspace (None: where PEFT starts it).

    Raises:
        InputError: if the adapter's modules do not fit the model or the subspace, or `max_length` leaves no response.
    """
    given = training_args.model_init_kwargs or {}
    assert isinstance(given, dict)  # transformers has parsed it
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation or exact_attention(source.model_config),
        "dtype": model_args.dtype,
        **given,
    }
    training_args.chat_template_path = None  # it is in the tokenizer already
    with cache_errors(), model_errors(source.model_name):
        trainer = SFTTrainer(
            model=source.model_name,
            args=training_args,
            train_dataset=to_sft(source.train),
            eval_dataset=to_sft(source.held_out),
            processing_class=source.tokenizer,
            peft_config=lora_config(model_args, sails_args, source, subspace),
            quantization_config=get_quantization_config(model_args),
            callbacks=callbacks,
        )
    _check_lengths(trainer, source)
    if subspace is None:
        return trainer, None
    assert sails_args.init_scale is not None
    assert isinstance(trainer.model, PeftModel)
    init = initialize_adapter(
        trainer.model,
        subspace,
        layer_map=sails_args.layer_map,  # pyright: ignore[reportArgumentType] -- checked in SailsArguments
        fold_norm=bool(sails_args.fold_norm),
        subspace_mode=sails_args.subspace_mode,  # pyright: ignore[reportArgumentType]
        scale=sails_args.init_scale,
        seed=training_args.seed,
    )
    add_first(trainer, DriftCallback(init))
    if sails_args.subspace_mode == "decay":
        trainer.add_callback(SubspaceDecay(init, sails_args.subspace_decay))
    return trainer, init


def left_out(trainer: SFTTrainer, source: Source) -> dict[str, int]:
    """How many examples TRL has dropped, because their prompts alone fill `max_length`, of each part of the data."""
    assert isinstance(trainer.args, SFTConfig)
    if trainer.args.packing:  # then nothing is cut off, and TRL's rows are not examples
        return {}
    kept = {"training": trainer.train_dataset, "held-out": trainer.eval_dataset}
    given = {"training": source.train, "held-out": source.held_out}
    return {part: len(given[part]) - len(kept[part]) for part in given}


def _check_lengths(trainer: SFTTrainer, source: Source) -> None:
    """Refuse a `max_length` that leaves no example, and say how many it leaves out."""
    assert isinstance(trainer.args, SFTConfig)
    given = {"training": len(source.train), "held-out": len(source.held_out)}
    for part, n in left_out(trainer, source).items():
        what = f"the prompts alone of {n} of {given[part]} {part} examples fill max_length {trainer.args.max_length}"
        if n == given[part]:
            raise InputError(f"{what}: no response is left;\nchoose a larger --max_length")
        if n:
            logger.warning("%s: they are left out (a larger --max_length keeps them)", what)


def lora_config(
    model_args: ModelConfig, sails_args: SailsArguments, source: Source, subspace: Subspace | None
) -> LoraConfig:
    """PEFT's configuration from TRL's options; q, k, v and o unless other modules are named."""
    model_args.use_peft = True
    d_model = source.model_config.get_text_config().hidden_size
    if model_args.lora_r > d_model:
        raise InputError(f"lora_r is {model_args.lora_r}, but {source.name} has d_model {d_model}: choose at most that")
    wanted: Any = model_args.lora_target_modules or DEFAULT_TARGETS  # TRL makes a list of one a string
    names: list[str] = [wanted] if isinstance(wanted, str) else list(wanted)
    if subspace is not None:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(source.model_config)
        assert sails_args.layer_map is not None
        names = target_modules_for(skeleton, names, subspace, sails_args.layer_map)  # pyright: ignore[reportArgumentType]
    model_args.lora_target_modules = names
    config = get_peft_config(model_args)
    assert isinstance(config, LoraConfig)
    return config


def run_identity(
    sails_args: SailsArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    source: Source,
    subspace: Subspace | None,
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this run's: resuming with anything else would mix two runs."""
    return {
        "model": source.identity(),
        "data": source.data_hash(),
        "subspace": None if subspace is None else subspace_hash(subspace),
        "init": sails_args.init,
        "layer_map": sails_args.layer_map,
        "fold_norm": sails_args.fold_norm,
        "init_scale": sails_args.init_scale,
        "subspace_mode": sails_args.subspace_mode,
        "subspace_decay": sails_args.subspace_decay,
        "lora_r": model_args.lora_r,
        "lora_alpha": model_args.lora_alpha,
        "lora_target_modules": model_args.lora_target_modules,
        "lora_dropout": model_args.lora_dropout,
        "use_rslora": model_args.use_rslora,
        "learning_rate": training_args.learning_rate,
        "seed": training_args.seed,
        "per_device_train_batch_size": training_args.per_device_train_batch_size,
        "gradient_accumulation_steps": training_args.gradient_accumulation_steps,
        "max_length": training_args.max_length,
        "packing": training_args.packing,
        "chat_template": content_hash(source.tokenizer.chat_template),
        "optim": str(training_args.optim),
        "weight_decay": training_args.weight_decay,
        "lr_scheduler_type": str(training_args.lr_scheduler_type),
        "dtype": model_args.dtype,
    }


def subspace_hash(subspace: Subspace) -> str:
    """Content hash of a subspace's bases."""
    return tensors_hash({str(layer): basis_DR for layer, basis_DR in subspace.bases.items()})


class MarkCheckpoints(TrainerCallback):
    """Puts the run's identity into every checkpoint, so that another run cannot resume from it by mistake."""

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity = identity

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write `run.json` into the checkpoint just saved."""
        if state.is_world_process_zero:
            write_json(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "run.json", self.identity)


def find_checkpoint(training_args: SFTConfig, identity: dict[str, Any]) -> str | None:
    """The checkpoint to resume from: the last whole one in the output directory for `--resume_from_checkpoint true`
    (None if there is none yet), or the one named.

    Raises:
        InputError: if it is not a checkpoint, or one of another run.
    """
    wanted = training_args.resume_from_checkpoint
    if not wanted or wanted.lower() == "false":
        return None
    output_dir = Path(str(training_args.output_dir))
    if wanted.lower() == "true":
        found = _last_whole_checkpoint(output_dir)
        if found is None:
            logger.warning("%s has no checkpoint yet: training starts from the beginning", output_dir)
            return None
    else:
        found = wanted
    path = Path(found) / "run.json"
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"cannot resume from {found}: {path.name} cannot be read ({error});\n"
            "give a whole checkpoint of this run, or leave --resume_from_checkpoint out"
        ) from error
    different = [name for name in identity if content_hash(identity[name]) != content_hash(other.get(name))]
    if different:
        raise InputError(
            f"cannot resume from {found}: it is of another run (different: {', '.join(different)});\n"
            "use the same options, another --output_dir, or leave --resume_from_checkpoint out"
        )
    return found


def _last_whole_checkpoint(output_dir: Path) -> str | None:
    """The last checkpoint with a `run.json`, which is written last: a process killed while it wrote one leaves a part.

    transformers' `get_last_checkpoint` would take the part.
    """
    whole = [file.parent for file in output_dir.glob("checkpoint-*/run.json")]
    numbered = [path for path in whole if path.name.removeprefix("checkpoint-").isdecimal()]
    return str(max(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))) if numbered else None


def train(trainer: SFTTrainer, checkpoint: str | None) -> None:
    """Train. If that ends in an error while a checkpoint is being written, the part of it goes."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:
        part = Path(str(trainer.args.output_dir)) / f"checkpoint-{trainer.state.global_step}"
        if trainer.is_world_process_zero() and not (part / "run.json").exists():  # written last, by `MarkCheckpoints`
            shutil.rmtree(part, ignore_errors=True)
        raise


def save_adapter(trainer: SFTTrainer, output_dir: Path) -> None:
    """Write the adapter, the tokenizer and the trainer's options, each file as a whole or not at all."""
    part = output_dir / ".adapter"
    try:
        trainer.save_model(str(part))  # by all processes
        if trainer.is_world_process_zero():
            for file in part.iterdir():
                file.chmod(0o644)  # safetensors makes it private
                os.replace(file, output_dir / file.name)
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(part, ignore_errors=True)
