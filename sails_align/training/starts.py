"""Prepare the model and the adapter that a training starts from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel
from trl import get_peft_config, get_quantization_config

from sails_align.core.errors import InputError
from sails_align.data.prefilled import response_of
from sails_align.data.tokens import TokenizedSide, tokenize_response
from sails_align.initializers import leaves_base_alone
from sails_align.initializers.targets import target_modules_for
from sails_align.models.adapters import base_named_by, check_complete, read_adapter
from sails_align.models.language_model import outside_decoder
from sails_align.models.load import empty_model, exact_attention, load_causal_lm
from sails_align.models.quantized import is_quantized, use_one_layout
from sails_align.models.spec import identity_of, is_same_model
from sails_align.subspace.basis import Subspace
from sails_align.training.dataset import TrainingSource
from sails_align.training.plan import TrainingPlan, changed

DEFAULT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
"""With rank 16 these are 0.19% of Gemma-2-9B's parameters and 0.24% of 2B's: the shares the paper reports."""
N_EXAMPLES = 512


def model_init_kwargs(args: TrainingPlan, source: TrainingSource) -> dict[str, Any]:
    """Return the options of `from_pretrained` for the model to train (and for TRL's copy of it as DPO's reference)."""
    given = args.training.model_init_kwargs or {}
    assert isinstance(given, dict)  # transformers has parsed it
    return {
        "revision": args.model.model_revision,
        "attn_implementation": args.model.attn_implementation or exact_attention(source.model_config),
        "dtype": args.model.dtype,
        "use_safetensors": True,  # no pickles
        **given,
    }


def is_few_bits(args: TrainingPlan, source: TrainingSource) -> bool:
    """Return whether the base model is quantized: by an option, or as it is published."""
    published = getattr(source.model_config, "quantization_config", None) is not None
    return published or args.model.load_in_4bit or args.model.load_in_8bit


def lora_config(
    args: TrainingPlan, source: TrainingSource, subspace: Subspace | None
) -> tuple[TrainingPlan, LoraConfig]:
    """Return the plan with the modules to adapt (q, k, v and o unless others are named), and PEFT's configuration.

    Raises `InputError` if the rank does not suit the model or the initialization, or (with a subspace) a module cannot
    start in it.
    """
    check_rank(args, source.model_config)
    wanted: Any = args.model.lora_target_modules or DEFAULT_TARGETS
    # For PEFT alone, also "all-linear" or a regular expression; but TRL makes a list of one module a string.
    names: Any = [wanted] if isinstance(wanted, str) and wanted.isidentifier() else wanted
    skeleton = empty_model(source.model_config, trust_remote_code=args.training.trust_remote_code)
    if subspace is not None:
        names = adapted_modules(skeleton, args, subspace)
    args = replace(args, model=changed(args.model, lora_target_modules=names))
    config = get_peft_config(args.model)
    assert isinstance(config, LoraConfig)
    config.exclude_modules = outside_decoder(skeleton)
    if subspace is None:
        args.sails.initializer.load().configure(config)
    return args, config


def adapted_modules(model: PreTrainedModel, args: TrainingPlan, subspace: Subspace) -> list[str]:
    """Return the modules that get an adapter which starts in the subspace (`target_modules_for`)."""
    wanted: Any = args.model.lora_target_modules or DEFAULT_TARGETS
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    return target_modules_for(model, names, subspace, args.sails.layer_map)  # pyright: ignore[reportArgumentType]


def check_rank(args: TrainingPlan, config: PretrainedConfig) -> None:
    """Refuse a rank above the model's width, with an `InputError`."""
    d_model = config.get_text_config().hidden_size
    if args.model.lora_r > d_model:
        raise InputError(
            f"lora_r is {args.model.lora_r}, but {args.model_name} has d_model {d_model}: choose at most that"
        )


def load_base(args: TrainingPlan, source: TrainingSource, name: str | None = None) -> PreTrainedModel:
    """Load the model to train, or another one (such as DPO's reference) with the same options.

    Raises `InputError` if it cannot be loaded.
    """
    options = model_init_kwargs(args, source)
    model = load_causal_lm(
        name or source.model_name,
        trust_remote_code=args.training.trust_remote_code,
        quantization=get_quantization_config(args.model),
        **{**options, "revision": None if name else options["revision"]},
    )
    if is_quantized(model):
        use_one_layout(model)
    return model


def loaded_model(
    args: TrainingPlan, source: TrainingSource, config: LoraConfig | None
) -> PreTrainedModel | PeftModel | str:
    """Return what TRL's trainer takes as the model: a name, or a model where TRL could not make the right one.

    TRL makes an adapter from a configuration, and DPO's reference is then the model with the adapter off. That is not
    the model that training starts from if the adapter is trained already, or if its initialization changes the base
    weights or is zero only up to rounding. Given a PEFT model, TRL keeps a copy of its adapter for the reference.

    A quantized model must be prepared before TRL computes with it.
    """
    wrapped = args.sails.adapter_path is not None or (args.method == "dpo" and not args.sails.initializer.exact)
    if not wrapped and not is_few_bits(args, source):
        return source.model_name
    base = load_base(args, source)
    if not wrapped:
        return base
    assert config is not None, "full fine-tuning has neither"
    # As TRL does, and for its reason: under ZeRO-3 all weights must be of one type (DeepSpeed issue 8072).
    cast = args.engine != "zero3"
    torch.manual_seed(args.training.seed)
    if args.sails.adapter_path is None:
        model = get_peft_model(base, config, autocast_adapter_dtype=cast)
        config.init_lora_weights = True  # else TRL's copy would change the base once more
        return model
    _check_adapter(Path(args.sails.adapter_path), source)
    return PeftModel.from_pretrained(base, args.sails.adapter_path, is_trainable=True, autocast_adapter_dtype=cast)


def adopted(plan: TrainingPlan, model: PeftModel) -> TrainingPlan:
    """Return the plan with the shape of the trained adapter that training starts from."""
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    shape = {"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    modules = sorted(config.target_modules or ())
    return replace(plan, model=changed(plan.model, **shape, lora_target_modules=modules))


def _check_adapter(folder: Path, source: TrainingSource) -> None:
    """Refuse a folder without an adapter, one that is not plain LoRA, and one that was trained on another model."""
    adapter = read_adapter(folder)
    config = adapter.config
    extras = config.use_dora or config.lora_bias or config.bias != "none" or config.modules_to_save
    if extras or not leaves_base_alone(config.init_lora_weights):
        raise InputError(
            f"the adapter in {folder} is not a plain LoRA adapter, and training cannot start from it;\n"
            "merge it (sails merge) and give the result as --model_name_or_path"
        )
    check_complete(folder, source.model_config)
    trained_on = adapter.identity.get("model")
    if adapter.record:
        is_same, name = is_same_model(trained_on, source.identity()), (trained_on or {}).get("name")
    else:
        name = base_named_by(adapter)
        is_same = name in (None, source.model_name, source.name)
        is_same = is_same or (Path(str(name)).is_dir() and is_same_model(identity_of(str(name)), source.identity()))
    if not is_same:
        raise InputError(
            f"the adapter in {folder} was trained on another model ({name}) than {source.name};\n"
            "give --model_name_or_path the model it was trained on"
        )


def initialization_examples(source: TrainingSource, max_length: int) -> list[TokenizedSide]:
    """Return training examples for an initialization that needs some; the same on every process."""
    rows = source.train.select(range(min(N_EXAMPLES, len(source.train))))
    return [tokenize_response(source.tokenizer, row["prompt"], response_of(row), max_length) for row in rows]  # pyright: ignore[reportArgumentType, reportCallIssue]
