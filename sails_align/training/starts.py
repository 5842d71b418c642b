"""The adapter of a training: its configuration, the model it is made on, and adapters that are already trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from trl import get_peft_config, get_quantization_config

from sails_align.core.errors import InputError
from sails_align.data.tokens import TokenizedSide, tokenize_response
from sails_align.initializers import leaves_base_alone
from sails_align.initializers.peft import PeftInitializer
from sails_align.initializers.targets import target_modules_for
from sails_align.models.adapters import check_complete, read_json
from sails_align.models.attention import exact_attention
from sails_align.models.language_model import outside_decoder
from sails_align.models.loading import model_errors, not_partitioned
from sails_align.models.quantized import use_one_layout
from sails_align.subspace.basis import Subspace
from sails_align.training.dataset import TrainingSource
from sails_align.training.plan import TrainingPlan, changed

DEFAULT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
"""With rank 16 these are 0.19% of Gemma-2-9B's parameters and 0.24% of 2B's: the shares the paper reports."""
N_EXAMPLES = 512


def model_init_kwargs(args: TrainingPlan, source: TrainingSource) -> dict[str, Any]:
    """What `from_pretrained` is given for the model that is trained (and for TRL's copy of it as DPO's reference)."""
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
    """Whether the base model is quantized: by an option, or as it is published."""
    published = getattr(source.model_config, "quantization_config", None) is not None
    return published or args.model.load_in_4bit or args.model.load_in_8bit


def lora_config(
    args: TrainingPlan, source: TrainingSource, subspace: Subspace | None
) -> tuple[TrainingPlan, LoraConfig]:
    """PEFT's configuration from TRL's options, and the plan with its modules; q, k, v and o unless others are named.

    Raises:
        InputError: if the rank does not suit the model or the initialisation, or (with a subspace) a module cannot
            start in it.
    """
    check_rank(args, source.model_config, source.name)
    wanted: Any = args.model.lora_target_modules or DEFAULT_TARGETS
    # For PEFT alone, also "all-linear" or a regular expression; but TRL makes a list of one module a string.
    names: Any = [wanted] if isinstance(wanted, str) and wanted.isidentifier() else wanted
    with not_partitioned(), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            source.model_config, trust_remote_code=args.training.trust_remote_code
        )
    if subspace is not None:
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        assert args.sails.layer_map is not None
        names = target_modules_for(skeleton, names, subspace, args.sails.layer_map)  # pyright: ignore[reportArgumentType]
    args = replace(args, model=changed(args.model, lora_target_modules=names))
    config = get_peft_config(args.model)
    assert isinstance(config, LoraConfig)
    config.exclude_modules = outside_decoder(skeleton)
    if subspace is None:
        initializer: PeftInitializer = args.sails.initializer.load()
        initializer.configure(config)
    return args, config


def check_rank(args: TrainingPlan, config: PretrainedConfig, name: str) -> None:
    """Refuse a rank above the model's width.

    Raises:
        InputError: then.
    """
    d_model = config.get_text_config().hidden_size
    if args.model.lora_r > d_model:
        raise InputError(f"lora_r is {args.model.lora_r}, but {name} has d_model {d_model}: choose at most that")


def loaded_model(
    args: TrainingPlan, source: TrainingSource, config: LoraConfig | None
) -> PreTrainedModel | PeftModel | str:
    """What TRL's trainer is given as the model: a name, or a model where TRL could not make the right one.

    TRL makes an adapter from a configuration, and DPO's reference is then the model with the adapter off. That is not
    the model that training starts from if the adapter is trained already, or if its initialisation changes the base
    weights or is zero only up to rounding. Given a PEFT model, TRL keeps a copy of its adapter for the reference.

    A quantized model is loaded here, too, since it is to be prepared before TRL computes with it.
    """
    wrapped = args.sails.adapter_path is not None or (args.method == "dpo" and not args.sails.initializer.exact)
    quantized = is_few_bits(args, source)
    if not wrapped and not quantized:
        return source.model_name
    with model_errors(source.model_name):
        base = AutoModelForCausalLM.from_pretrained(
            source.model_name,
            trust_remote_code=args.training.trust_remote_code,
            quantization_config=get_quantization_config(args.model),
            **model_init_kwargs(args, source),
        )
    if quantized:
        use_one_layout(base)
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
    _check_adapter(Path(args.sails.adapter_path), args, source)
    return PeftModel.from_pretrained(base, args.sails.adapter_path, is_trainable=True, autocast_adapter_dtype=cast)


def adopted(plan: TrainingPlan, model: PeftModel) -> TrainingPlan:
    """The plan with the shape of the trained adapter that training starts from."""
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    shape = {"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    modules = sorted(config.target_modules or ())
    return replace(plan, model=changed(plan.model, **shape, lora_target_modules=modules))


def _check_adapter(folder: Path, args: TrainingPlan, source: TrainingSource) -> None:
    """Refuse a folder without an adapter, one that is not plain LoRA, and one that was trained on another model.

    Raises:
        InputError: then.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"there is no adapter in {folder}: adapter_config.json cannot be read;\n"
            "give the folder of a finished run, or one of its checkpoints"
        ) from error
    if not isinstance(config, LoraConfig) or not _is_plain(config):
        raise InputError(
            f"the adapter in {folder} is no plain LoRA adapter, and training cannot start from it;\n"
            "merge it (sails merge) and give the result as --model_name_or_path"
        )
    check_complete(folder, source.model_config)
    record = folder / "run.json"
    if record.is_file():
        written = read_json(record)
        trained_on = written.get("identity", written).get("model")
        same = trained_on in (None, source.identity())
        name = (trained_on or {}).get("name")
    else:
        name = config.base_model_name_or_path
        same = name in (None, source.model_name, source.name)
    if not same:
        raise InputError(
            f"the adapter in {folder} was trained on another model ({name}) than {source.name};\n"
            "give --model_name_or_path the model it was trained on"
        )


def _is_plain(config: LoraConfig) -> bool:
    extras = config.use_dora or config.lora_bias or config.bias != "none" or config.modules_to_save
    return leaves_base_alone(config.init_lora_weights) and not extras


def initialization_examples(source: TrainingSource, max_length: int) -> list[TokenizedSide]:
    """Training examples for an initialization that looks at some; the same on every process."""
    rows = source.train.select(range(min(N_EXAMPLES, len(source.train))))
    return [tokenize_response(source.tokenizer, row["prompt"], row["chosen"], max_length) for row in rows]  # pyright: ignore[reportArgumentType, reportCallIssue]
