"""Read what decides the memory of a training from its options and from its model, which is made without weights."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.training_args import OptimizerNames
from trl import DPOConfig, ModelConfig, get_peft_config

from sails_align.core.errors import InputError
from sails_align.initializers.adapter import freeze_factors
from sails_align.initializers.targets import find_targets
from sails_align.models.adapters import read_adapter
from sails_align.models.hooks import decoder_layers
from sails_align.models.language_model import freeze_outside_decoder, outside_decoder
from sails_align.models.load import empty_model, exact_attention
from sails_align.models.parameters import count_parameters
from sails_align.subspace.basis import Subspace
from sails_align.training.callbacks.options import EmaOptions
from sails_align.training.plan import TrainingPlan, changed
from sails_align.training.starts import DEFAULT_TARGETS, adapted_modules, check_rank


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide its memory."""

    n_parameters: int
    n_trainable: int
    n_saved: int
    """Parameters in a checkpoint: the adapter's, frozen factors included, or all."""
    n_layers: int
    block: int
    """Parameters of the largest decoder block."""
    embeddings: int
    """Parameters of the embeddings and the head, counted once if they are tied."""
    largest_module: int
    """Parameters of the module with most of its own: mostly the embeddings."""
    d_model: int
    n_heads: int
    head_width: int
    """Of all query heads together."""
    mlp_width: int
    norm_width: int
    """Of the norms of a block together."""
    linear: int
    """Parameters of all linear modules in the blocks, without adapters: what bitsandbytes holds in 4 or 8 bits."""
    trained_inputs: int
    """Inputs of those linear modules of a block that are trained, or whose adapter is: autograd keeps them."""
    head: int
    """Parameters of the head, if it is trained; else 0."""


@dataclass(frozen=True)
class Setup:
    """The options of a training that decide its memory."""

    rows: int
    """Sequences in a forward pass on one GPU; DPO has two for an example."""
    length: int
    weight_bytes: int
    compute_bytes: int
    adapter: bool
    checkpointing: bool
    stores_scores: bool
    """Whether attention keeps its matrix of scores ("eager"), as Gemma 2 needs it, or not (SDPA, FlashAttention)."""
    reference: Literal["none", "adapter", "model"]
    """What is kept as a frozen copy: the reference of DPO or of the loss `constrained`, or the start that an adapter's
    difference is taken from.

    A new adapter mostly needs none: its reference is the model with the adapter off.
    """
    quantized_bytes: float | None = None
    """Bytes of a weight of the blocks' linear modules, if bitsandbytes holds these in 4 or 8 bits."""
    averaged: bool = False
    """Whether an average of the trained weights is kept in fp32 (`--ema_half_life`)."""


def shape_of(model: PreTrainedModel | PeftModel) -> Shape:
    """Count a model, with or without an adapter, on any device (also "meta").

    Raises `InputError` if it has no decoder blocks.
    """
    blocks = decoder_layers(model)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config.get_text_config(decoder=True)
    embeddings, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    ends = {id(p): p for p in (embeddings, head)}  # one, if they are tied
    # `head_dim` is not in every configuration; transformers' models fall back in the same way.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    norms = [[m for m in block.modules() if type(m).__name__.endswith("Norm")] for block in blocks]
    linears = [{name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)} for block in blocks]
    n_trainable, n_parameters = count_parameters(model)
    n_adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return Shape(
        n_parameters=n_parameters,
        n_trainable=n_trainable,
        n_saved=n_adapter or n_parameters,
        n_layers=len(blocks),
        block=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        embeddings=sum(p.numel() for p in ends.values()),
        largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        head_width=config.num_attention_heads * head_dim,
        mlp_width=config.intermediate_size,
        norm_width=max(sum(norm.weight.numel() for norm in of) for of in norms),  # pyright: ignore
        linear=sum(module.weight.numel() for of in linears for name, module in of.items() if "lora_" not in name),
        trained_inputs=max(sum(m.in_features for m in of.values() if m.weight.requires_grad) for of in linears),
        head=head.numel() if head.requires_grad else 0,
    )


def meta_model(
    args: TrainingPlan, config: PreTrainedConfig, subspace: Subspace | None = None
) -> PreTrainedModel | PeftModel:
    """Make the model to train, with its adapter, on the meta device.

    Args:
        args: of the training.
        config: of its model.
        subspace: that the adapter starts in. None: every block has adapters, as with `layer_map: nearest`.

    Raises:
        InputError: if a module that is to be adapted is not in the model, or there is no adapter in `--adapter_path`.
    """
    config = deepcopy(config)  # transformers writes the type of the weights to it
    model = empty_model(config, dtype=loaded_dtype(args, config), trust_remote_code=args.training.trust_remote_code)
    if not args.model.use_peft:
        freeze_outside_decoder(model)
        return model
    adapter = _adapter_config(args, config)
    if subspace is not None:
        adapter.target_modules = adapted_modules(model, args, subspace)
    adapter.exclude_modules = outside_decoder(model)
    # There are no values to compute an initialization from, and they do not matter here.
    adapter.init_lora_weights, adapter.inference_mode = True, False
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, adapter)
    except ValueError as error:
        cause = " ".join(str(error).split())
        raise InputError(f"the adapter does not suit the model: {cause};\nsee --lora_target_modules") from error
    if args.sails.uses_subspace:
        freeze_factors(find_targets(adapted, "default"), args.sails.freeze, "default")  # pyright: ignore[reportArgumentType]
    return adapted  # pyright: ignore[reportReturnType]


def loaded_dtype(args: TrainingPlan, config: PreTrainedConfig) -> torch.dtype:
    """Return the type that `--dtype` loads weights in."""
    name = args.model.dtype or "float32"  # TRL's default
    dtype = (config.dtype or torch.float32) if name == "auto" else getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _adapter_config(args: TrainingPlan, model_config: PreTrainedConfig) -> LoraConfig:
    if args.sails.adapter_path is not None:
        return read_adapter(Path(args.sails.adapter_path)).config
    check_rank(args, model_config)
    modules: Any = args.model.lora_target_modules or DEFAULT_TARGETS
    return get_peft_config(changed(args.model, lora_target_modules=modules))  # pyright: ignore[reportReturnType]


def setup_of(args: TrainingPlan, config: PreTrainedConfig) -> Setup:
    """Return the setup that a recipe's options give; raise `InputError` for options that the formulas do not cover."""
    model, training, reference = args.model, args.training, "none"
    _check_covered(args)
    assert training.max_length is not None
    if isinstance(training, DPOConfig) and not training.precompute_ref_log_probs:
        if args.dpo.ref_model_name_or_path is not None or not model.use_peft:
            reference = "model"
        elif args.sails.adapter_path is not None or not args.sails.initializer.exact:
            reference = "adapter"
    is_constrained = (args.loss or {}).get("name") == "constrained"
    if (args.sails.initializer.trains_difference or is_constrained) and reference == "none":
        reference = "adapter"
    weight_bytes = loaded_dtype(args, config).itemsize
    return Setup(
        rows=training.per_device_train_batch_size * (2 if args.method == "dpo" else 1),
        length=training.max_length,
        weight_bytes=weight_bytes,
        compute_bytes=2 if training.bf16 or training.fp16 else weight_bytes,
        adapter=model.use_peft,
        checkpointing=training.gradient_checkpointing,
        stores_scores=(model.attn_implementation or exact_attention(config)) == "eager",
        reference=reference,
        quantized_bytes=_quantized_bytes(model),
        averaged=args.of(EmaOptions).ema_half_life is not None,
    )


def _quantized_bytes(model: ModelConfig) -> float | None:
    """Return the bytes of a quantized weight, with its share of the scales; None if weights are not quantized.

    In 4 bits, 64 weights share a fp32 scale; with nested quantization the scale has 8 bits, and 256 scales share a fp32
    one.
    """
    if model.load_in_4bit:
        return 0.5 + (1 / 64 + 4 / (64 * 256) if model.use_bnb_nested_quant else 4 / 64)
    return 1.0 if model.load_in_8bit else None


def _check_covered(args: TrainingPlan) -> None:
    optim = OptimizerNames(args.training.optim)
    if optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
        raise InputError(f"optim is {optim.value}, but only AdamW can be estimated; leave --optim out")
    if args.training.max_length is None:
        raise InputError("max_length is none, so the length of examples is unknown; pass --max_length")
