"""Defaults of training options, by model: in place of TRL's and PEFT's, which serve other purposes.

YAML and the command line override them. Models that come with data and SAEs have those, too.
"""

from dataclasses import replace
from typing import Any, Literal

from sails_align.models import resolver_of
from sails_align.models.spec import known_as, model_path
from sails_align.smollm2 import HUB_ID as SMOLLM2
from sails_align.smollm2.saes import sae_folder
from sails_align.subspace.options import Method
from sails_align.testbed.build import MODEL_NAME, Testbed, is_testbed, resolve_testbed
from sails_align.training.losses import loss_entry
from sails_align.training.losses.options import LossOptions
from sails_align.training.plan import TrainingPlan, changed

Trained = Literal["full", "new", "trained"]
"""What is trained: all weights, a new adapter, or one that is trained already."""
Rates = dict[Method, dict[Trained, float]]

COMMON = {
    "use_peft": True,
    "lora_dropout": 0.0,
    "warmup_steps": 0.1,
    "logging_steps": 10,
    "save_total_limit": 2,
}
# TRL's rates are for all weights; its documentation advises ten times the rate for LoRA.
RATES: Rates = {
    "sft": {"full": 2e-5, "new": 2e-4, "trained": 2e-4},
    "dpo": {"full": 1e-6, "new": 1e-5, "trained": 1e-5},
}
ALL_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OWN: dict[str, dict[str, Any]] = {
    MODEL_NAME: {
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": ALL_PROJECTIONS,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "num_train_epochs": 4,
        "max_train_examples": 512,
        "max_length": 64,
        "gradient_checkpointing": False,
        "save_steps": 20,
    },
    SMOLLM2: {
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": ALL_PROJECTIONS,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "train_sampling_strategy": "group_by_length",
        "max_length": 128,
        "gradient_checkpointing": False,
        "logging_steps": 4,
    },
}
"""Of models that come with the package, by the name that they are known as."""
# Chosen on validation prompts: docs/training.md.
OWN_RATES: dict[str, Rates] = {
    MODEL_NAME: {
        "sft": {"full": 1e-3, "new": 1e-2, "trained": 1e-2},
        "dpo": {"full": 1e-3, "new": 1e-2, "trained": 1e-4},
    },
    SMOLLM2: {
        "sft": {"full": 2e-5, "new": 1e-3, "trained": 1e-3},
        "dpo": {"full": 1e-6, "new": 1e-4, "trained": 1e-4},
    },
}


def _own_name(model: str | None) -> str | None:
    """Return the name of a model that comes with the package; None of other models."""
    name = known_as(model or MODEL_NAME)
    return name if name in OWN and (model is None or resolver_of(model) is not None) else None


def defaults_of(model: str | None, method: Method, trained: Trained) -> dict[str, Any]:
    """Return the defaults of options for a model (None: the testbed's)."""
    own = _own_name(model)
    if own is None:
        return {**COMMON, "learning_rate": RATES[method][trained]}
    return {**COMMON, **OWN[own], "learning_rate": OWN_RATES[own][method][trained]}


def resolved(plan: TrainingPlan) -> tuple[TrainingPlan, Testbed | None]:
    """Find or make what a plan names: models, and the SAEs and data that come with a model if no others are named.

    Returns:
        the plan with their paths, and the testbed to train on.
    """
    model, reference = plan.model.model_name_or_path, plan.dpo.ref_model_name_or_path
    plan = replace(plan, name=known_as(model or MODEL_NAME))
    if reference is not None:
        plan = replace(plan, dpo=replace(plan.dpo, ref_model_name_or_path=model_path(reference)))
    if model is None or is_testbed(model):
        testbed = resolve_testbed(model)
        sails = plan.sails if plan.sails.saes().named else plan.sails.replaced(sae_path=testbed.sae_path)
        return _at(replace(plan, sails=sails), testbed.model_path), testbed
    if _own_name(model) == SMOLLM2:
        plan = _with_saes(_with_twins(plan))
    return _at(plan, model_path(model)), None


def _at(plan: TrainingPlan, path: str) -> TrainingPlan:
    return replace(plan, model=changed(plan.model, model_name_or_path=path))


def _with_saes(plan: TrainingPlan) -> TrainingPlan:
    """Return a plan with SAEs of `smollm2`, if it needs some and names none."""
    if plan.sails.saes().named or plan.sails.subspace_path is not None:
        return plan
    loss = loss_entry(plan.of(LossOptions))
    if not plan.sails.initializer.needs_saes and not (loss and loss.needs_saes):
        return plan
    return replace(plan, sails=plan.sails.replaced(sae_path=sae_folder()))


def _with_twins(plan: TrainingPlan) -> TrainingPlan:
    """Return a plan with the requests that come with the package, if it names no data."""
    if plan.script.dataset_name is not None:
        return plan
    data = plan.data
    if data.helpful_dataset_name is None:
        data = replace(data, helpful_dataset_name="twins-answered")
    return replace(plan, data=data, script=changed(plan.script, dataset_name="twins-refused"))
