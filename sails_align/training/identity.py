"""Decide whether two trainings are the same, so that a checkpoint of one is never resumed by another.

A run's identity has every option of every class (ours, TRL's, transformers' and PEFT's) except `NOT_IN_IDENTITY`, and
the content of what the options name: model, data, template, adapter, SAEs, reference.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sails_align.core import earlier
from sails_align.core.artifacts import content_hash, file_hash, tensors_hash
from sails_align.core.distributed import n_processes
from sails_align.core.options import all_but, different
from sails_align.data.pairs import fingerprint
from sails_align.edits.requests import named_requests
from sails_align.models.spec import identity_of
from sails_align.subspace.basis import Subspace
from sails_align.training.callbacks.options import FreezeUnitsOptions, SiftOptions
from sails_align.training.dataset import TrainingSource
from sails_align.training.losses import loss_entry
from sails_align.training.losses.options import LossOptions
from sails_align.training.plan import TrainingPlan


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


NOT_IN_IDENTITY: Mapping[str, frozenset[str]] = {
    "where results go, and what is logged, saved and reported": _names(
        """output_dir overwrite_output_dir resume_from_checkpoint disable_tqdm report_to run_name project debug
        trackio_space_id trackio_bucket_id trackio_static_space_id log_level log_level_replica log_on_each_node
        logging_strategy logging_steps logging_first_step logging_nan_inf_filter include_num_input_tokens_seen
        skip_memory_metrics save_strategy save_steps save_total_limit save_only_model save_on_each_node
        enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
        hub_revision log_completions log_multimodal num_completions_to_print log_unique_prompts
        log_completions_hub_repo"""
    ),
    "how it is measured while it trains": _names(
        """do_train do_eval do_predict measure_steps measure_prompts measure_n_prompts eval_strategy eval_steps
        eval_delay eval_on_start
        eval_do_concat_batches eval_use_gather_object eval_accumulation_steps per_device_eval_batch_size
        prediction_loss_only include_for_metrics batch_eval_metrics"""
    ),
    "how the machine does it, with the same result": _names(
        """local_rank ddp_backend ddp_timeout gradient_checkpointing gradient_checkpointing_kwargs dataset_num_proc
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context torch_empty_cache_steps precompute_ref_batch_size sae_placement"""
    ),
    "known by what they name or stand for": _names(
        """model_name_or_path dataset_name helpful_dataset_name chat_template_path adapter_path sae_path subspace_path
        ref_model_name_or_path warm_start_path preset freeze_units harmful_prompts
        refusal_dataset_name sift_safety_dataset_name"""
    ),
    "compared apart: a resumed run may train longer": _names("max_steps num_train_epochs"),
}
"""Options that are not in the identity, by the reason."""
_NOT_IN_IDENTITY = frozenset().union(*NOT_IN_IDENTITY.values())
DECIDES_BEST = _names("save_strategy save_steps eval_strategy eval_steps eval_delay per_device_eval_batch_size")
"""With `load_best_model_at_end`, they decide which model is the result."""
DECIDED_LATER = ("subspace", "lora_target_modules", "lora_r", "lora_alpha", "lora_dropout")
"""Of the identity, what is known only when the trainer is built."""


def run_identity(args: TrainingPlan, source: TrainingSource, subspace: Subspace | None) -> dict[str, Any]:
    """Return what must be the same for a checkpoint to be this run's."""
    sails, reference = args.sails, args.dpo.ref_model_name_or_path
    return {
        "method": args.method,
        "model": source.identity(),
        "data": source.data_hash(),
        "held_out": fingerprint(source.held_out),
        "saes": _subspace_source(args),
        "subspace": None if subspace is None else tensors_hash(subspace.tensors()),
        "init": args.start,
        "harmful_prompts": None if source.harmful_prompts is None else fingerprint(source.harmful_prompts),
        "adapter": None if sails.adapter_path is None else identity_of(sails.adapter_path),
        "reference": None if reference is None else identity_of(reference),
        "units": _units(args),
        "texts": _texts(args, source),
        "protected": _protected(args, source),
        "engine": args.engine,
        "n_processes": n_processes(),
        "chat_template": content_hash(source.tokenizer.chat_template),
        "options": option_values(args.training, sails, args.data, *args.extras, args.script, args.model, args.dpo),
        "length": length_of(args.training),
    }


def option_values(training: Any, *others: Any) -> dict[str, Any]:
    """Return the options of a training's classes that are in its identity, by name, as JSON values.

    Args:
        training: TRL's configuration.
        others: options of the other classes.
    """
    left_out = _NOT_IN_IDENTITY - DECIDES_BEST if training.load_best_model_at_end else _NOT_IN_IDENTITY
    return all_but(left_out, training, *others)


def length_of(training: Any) -> dict[str, float]:
    """Return how long a run trains."""
    return {"max_steps": training.max_steps, "num_train_epochs": training.num_train_epochs}


def differences(identity: Mapping[str, Any], other: Mapping[str, Any], *, length: bool = False) -> list[str]:
    """Return what differs between an identity and an earlier one: options by name, with both values.

    Args:
        identity: of this run; parts that it lacks are not compared.
        other: of the earlier run.
        length: whether they must be equally long, too.
    """
    # The same subspace may come from SAEs or from a file: where it is known, its source does not matter.
    apart = ("length", *(["saes"] if identity.get("subspace") else []))
    found = earlier.differences({name: of for name, of in identity.items() if name not in apart}, other)
    return found + (different(identity["length"], other.get("length") or {}) if length else [])


def known_early(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an identity that is known before the trainer is built."""
    options = {name: value for name, value in identity["options"].items() if name not in DECIDED_LATER}
    return {**{name: value for name, value in identity.items() if name not in DECIDED_LATER}, "options": options}


def _subspace_source(args: TrainingPlan) -> dict[str, Any] | None:
    """Return the SAEs that are used, or the file that a subspace comes from; None without a subspace."""
    sails = args.sails
    loss = loss_entry(args.of(LossOptions))
    if loss is not None and loss.needs_saes:
        return sails.saes().identity()
    if not sails.uses_subspace:
        return None
    if sails.subspace_path is None:
        return sails.saes().identity()
    path = Path(sails.subspace_path) / "subspace.safetensors"
    return {"subspace": file_hash(path) if path.is_file() else None}


def _texts(args: TrainingPlan, source: TrainingSource) -> list[str | None] | None:
    """Return the hashes of what a loss reads besides the training rows; None if it reads nothing."""
    loss = loss_entry(args.of(LossOptions))
    if loss is None or not loss.reads_texts:
        return None
    return [None if rows is None else fingerprint(rows) for rows in (source.safety, source.helpful)]


def _protected(args: TrainingPlan, source: TrainingSource) -> str | None:
    """Return the hash of the refusals that sparse training protects; None without any."""
    name = args.of(SiftOptions).sift_safety_dataset_name
    return None if name is None else fingerprint(named_requests(name, "harmful", source.tokenizer).rows)


def _units(args: TrainingPlan) -> str | None:
    """Return the hash of the units to freeze; None without any."""
    folder = args.of(FreezeUnitsOptions).freeze_units
    return None if folder is None else file_hash(Path(folder) / "units.safetensors")
