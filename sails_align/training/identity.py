"""Decide whether two trainings are the same, so that a checkpoint of one is never resumed by another."""

import enum
from collections.abc import Sequence
from typing import Any

from trl import DPOConfig

from sails_align.core.artifacts import content_hash, tensors_hash
from sails_align.core.distributed import n_processes
from sails_align.models.spec import identity_of
from sails_align.subspace.basis import Subspace
from sails_align.training.callbacks.options import DecayOptions
from sails_align.training.dataset import TrainingSource
from sails_align.training.plan import TrainingPlan

# Options that decide what is minimized and how. The number of steps is not among them: a resumed run may train longer.
INITIALIZER = ("layer_map", "fold_norm", "init_scale", "subspace_mode")
MODEL = (
    "lora_r", "lora_alpha", "lora_target_modules", "lora_dropout", "use_rslora", "load_in_4bit", "load_in_8bit",
    "bnb_4bit_quant_type", "use_bnb_nested_quant", "attn_implementation", "dtype",
)  # fmt: skip
TRAINING = (
    "learning_rate", "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "optim",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "bf16", "fp16",
)  # fmt: skip
SFT = ("packing", "packing_strategy", "completion_only_loss")
DPO = (
    "beta", "loss_type", "loss_weights", "label_smoothing", "ld_alpha", "f_divergence_type", "use_weighting",
    "precompute_ref_log_probs", "truncation_mode",
)  # fmt: skip


def run_identity(args: TrainingPlan, source: TrainingSource, subspace: Subspace | None) -> dict[str, Any]:
    """Return what must be the same for a checkpoint to be this run's."""
    sails, training = args.sails, args.training
    identity = {
        "method": args.method,
        "model": source.identity(),
        "data": source.data_hash(),
        "subspace": None if subspace is None else tensors_hash(subspace.tensors()),
        "init": args.start,
        "adapter": None if sails.adapter_path is None else identity_of(sails.adapter_path),
        "subspace_decay": args.of(DecayOptions).subspace_decay,
        "loss": args.loss,
        "engine": args.engine,
        "n_processes": n_processes(),
        "chat_template": content_hash(source.tokenizer.chat_template),
        **values(sails, INITIALIZER),
        **values(args.model, MODEL),
        **values(training, TRAINING),
    }
    if isinstance(training, DPOConfig):
        reference = args.dpo.ref_model_name_or_path
        identity |= {"reference": None if reference is None else identity_of(reference)}
    return identity | values(training, DPO if isinstance(training, DPOConfig) else SFT)


def values(options: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return JSON-able values of some options."""
    found = {name: getattr(options, name) for name in names}
    return {name: str(value) if isinstance(value, enum.Enum) else value for name, value in found.items()}


def different(identity: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of what differs between two identities."""
    return [name for name in identity if content_hash(identity[name]) != content_hash(other.get(name))]
