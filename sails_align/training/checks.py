"""Refuse options that contradict each other, and options that this machine or model cannot do.

TRL, PEFT and transformers ignore some of them, or do something else; others they refuse only after the subspace is
found.
"""

import logging
import math
import os
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version
from transformers import PreTrainedConfig
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import (
    is_bitsandbytes_available,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
    is_liger_kernel_available,
)
from transformers.utils.generic import is_flash_attention_requested

from sails_align.core.errors import InputError
from sails_align.core.trackers import check_services
from sails_align.data.options import DertaOptions, NearestRefusalOptions
from sails_align.initializers import INITIALIZERS
from sails_align.models.load import exact_attention
from sails_align.subspace.options import PRESETS
from sails_align.testbed.build import is_testbed
from sails_align.training.callbacks.options import EmaOptions, FreezeUnitsOptions, SiftOptions
from sails_align.training.losses import LOSSES, loss_entry
from sails_align.training.losses.options import LossOptions
from sails_align.training.memory import WHOLE_WEIGHTS
from sails_align.training.method_checks import (
    check_clade,
    check_loss,
    check_prefilled,
    check_sift,
    check_stages,
    check_units,
)
from sails_align.training.options import MeasureOptions
from sails_align.training.plan import TrainingPlan
from sails_align.training.zeroth_order.checks import check_zeroth_order

logger = logging.getLogger(__name__)

SIZES = ("max_length", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
RANGES = (  # smallest value, the first one that is too large, and the options
    (sys.float_info.min, math.inf, "a positive number", ("learning_rate", "num_train_epochs", "beta", "lora_alpha")),
    (1, math.inf, "1 or more", ("lora_r", *SIZES)),
    (0, math.inf, "0 or more", ("weight_decay", "warmup_steps", "max_grad_norm", "dataloader_num_workers")),
    (0, 1, "0 or more, and less than 1", ("lora_dropout", "adam_beta1", "adam_beta2")),
    (0, 2**32, "0 or more, and less than 2 to the power of 32", ("seed",)),
)
LORA_OPTIONS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")

FLASH_WITH_SOFT_CAP = "2.6"
"""The first version of flash-attn with a soft-cap; transformers omits it with an older one."""


def check_options(args: TrainingPlan) -> None:
    """Refuse options that contradict each other on any machine, with an `InputError`."""
    _check_start(args)
    _check_values(args)
    args.make_loss()
    check_loss(args)
    _check_saving(args)
    check_units(args)
    check_sift(args)
    check_zeroth_order(args)
    check_services(args.training.report_to or [], get_available_reporting_integrations())
    _check_engine(args)
    if bits := _quantization(args):
        _check_quantization(args, bits)
    _check_batches(args)
    check_prefilled(args)
    check_stages(args)
    check_clade(args)


def _check_start(args: TrainingPlan) -> None:
    """Refuse options that name two things to start from, and warn of those that have no effect."""
    sails = args.sails
    given = [name for name in ("init", "adapter_path", "subspace_path") if getattr(sails, name) is not None]
    if given and not args.model.use_peft:
        raise InputError(
            f"--use_peft false trains all weights, without an adapter, but --{given[0]} is given;\n"
            "leave one of them out"
        )
    if sails.subspace_path is not None and not sails.uses_subspace:
        raise InputError(f"--subspace_path is given, but {args.start} uses no subspace; leave one of them out")
    without_effect = () if sails.uses_subspace else (*PRESETS["default"], "subspace_decay")
    without_effect = (*without_effect, *_of_other_starts(args), *_of_other_losses(args))
    if not args.model.use_peft or sails.adapter_path is not None:
        without_effect = (*without_effect, *LORA_OPTIONS)
    ignored = [name for name in without_effect if name in args.given]
    if "derta_empty_share" in args.given and args.of(DertaOptions).derta_prefix_share == 0:
        ignored.append("derta_empty_share")
    if "refusal_tokens" in args.given and not args.of(NearestRefusalOptions).nearest_refusal:
        ignored.append("refusal_tokens")
    # A warning only: adding one option to a file of options should be enough to make a baseline.
    if ignored:
        logger.warning("of no effect with %s: %s", args.start, ", ".join(ignored))


def _of_other_starts(args: TrainingPlan) -> list[str]:
    """Return the options of initializations that this training does not use."""
    used = args.sails.initializer
    others = [entry.options for _, entry in INITIALIZERS.items() if entry.options not in (None, used.options)]
    names = [option.name for options in others for option in fields(options)]  # pyright: ignore[reportArgumentType]
    return names if used.needs_prompts else [*names, "harmful_prompts"]


def _of_other_losses(args: TrainingPlan) -> list[str]:
    """Return the options of losses that this training does not use."""
    used = (args.loss or {}).get("name")
    others = [entry.options for name, entry in LOSSES.items() if name != used]
    return [option.name for options in others if options is not None for option in fields(options)]


def _check_values(args: TrainingPlan) -> None:
    """Refuse numbers that transformers, PEFT and torch accept, or that end in their tracebacks."""
    given = vars(args.model) | vars(args.training)
    for low, high, allowed, names in RANGES:
        for name in names:
            if (value := given.get(name)) is not None and not low <= value < high:
                raise InputError(f"{name} is {value}, but must be {allowed}")
    if args.of(MeasureOptions).measure_prompts and is_testbed(args.model.model_name_or_path or "testbed"):
        raise InputError("measure_prompts is given, but the testbed's rates are always measured; leave it out")
    if args.training.max_steps == 0:
        raise InputError("max_steps is 0, which trains nothing; leave it out, or choose 1 or more")


def _check_saving(args: TrainingPlan) -> None:
    """Refuse options with which a run cannot be resumed, or something else than the finished run is kept."""
    training, adapter = args.training, args.sails.adapter_path
    if training.save_total_limit == 1:
        raise InputError(
            "save_total_limit is 1: while a checkpoint is written there is no other complete one;\nchoose 2 or more"
        )
    if adapter is not None and Path(adapter).resolve() == Path(str(training.output_dir)).resolve():
        raise InputError(f"--adapter_path is {adapter}, where the new adapter would go; give another --output_dir")
    if training.load_best_model_at_end and args.of(EmaOptions).ema_half_life is not None:
        raise InputError(
            "load_best_model_at_end is true, but with ema_half_life the result is the average over all steps;\n"
            "leave one of them out"
        )
    for name in ("save_only_model", "sync_ref_model"):
        if getattr(training, name, False):
            raise InputError(f"{name} is true, but then a run cannot be resumed without loss; leave it out")
    if training.push_to_hub and training.hub_strategy != "every_save":  # which is TRL's default
        raise InputError("hub_strategy is given, but only the finished run is pushed; leave it out")


def _check_engine(args: TrainingPlan) -> None:
    """Refuse what an engine cannot do."""
    sails, engine = args.sails, args.engine
    if args.asks_for_fsdp and engine == "ddp":
        logger.warning("accelerate has no FSDP on CPUs: this runs as DDP")
    if sails.initializer.needs_whole_weights and engine in ("zero3", "fsdp"):
        raise InputError(
            f"--init {sails.init} is computed from whole weights, but {engine} splits them;\n"
            "use ZeRO-2 or DDP (accelerate_configs/zero2.yaml), or another --init"
        )
    if engine not in WHOLE_WEIGHTS and (option := writing_option(args)):
        raise InputError(
            f"{option} does not work with {engine}, which trains copies or parts of the weights;\n"
            "leave it out, or train on one GPU or with DDP"
        )
    measures = args.of(MeasureOptions)
    given = [name for name in ("measure_steps", "measure_prompts") if getattr(measures, name)]
    if engine not in WHOLE_WEIGHTS and given:
        raise InputError(
            f"{given[0]} is given, but a model that {engine} trains cannot be measured before it is saved;\n"
            "leave it out, or train on one GPU or with DDP"
        )
    plugin = args.training.deepspeed_plugin
    stage_3 = {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})
    if engine == "zero3" and not stage_3.get("stage3_gather_16bit_weights_on_model_save"):
        raise InputError(
            "the DeepSpeed configuration lacks stage3_gather_16bit_weights_on_model_save: true, without which "
            "ZeRO-3 saves no weights;\nadd it (in accelerate's files: zero3_save_16bit_model: true)"
        )
    if engine == "fsdp" and os.environ.get("FSDP_STATE_DICT_TYPE") != "FULL_STATE_DICT":
        raise InputError(
            "FSDP would save weights in parts, which nothing else can load;\n"
            "set fsdp_state_dict_type: FULL_STATE_DICT (as accelerate_configs/fsdp2.yaml does)"
        )


def writing_option(args: TrainingPlan) -> str | None:
    """Return an option that writes parameters or computes with them, which needs whole ones; None if there is none."""
    loss = loss_entry(args.of(LossOptions))
    used = {
        "subspace_mode decay": args.sails.uses_subspace and args.sails.subspace_mode == "decay",
        "ema_half_life": args.of(EmaOptions).ema_half_life is not None,
        "freeze_units": args.of(FreezeUnitsOptions).freeze_units is not None,
        "clade": args.clade,
        f"loss {args.of(LossOptions).loss}": loss is not None and loss.needs_whole_weights,
        "sift_rate": args.of(SiftOptions).sift_rate is not None,
    }
    return next((name for name, is_used in used.items() if is_used), None)


def _check_batches(args: TrainingPlan) -> None:
    """Refuse options of batches and checkpointing that TRL ignores, or that change what is trained."""
    training: Any = args.training
    selective = (training.gradient_checkpointing_kwargs or {}).get("selective")
    if args.method == "dpo" and training.padding_free:
        raise InputError("padding_free is true, but TRL's DPO pads all the same; leave it out")
    if args.method == "dpo" and selective:
        raise InputError("gradient_checkpointing_kwargs has selective, which TRL has for SFT only; leave it out")
    if args.method == "dpo":
        return
    if training.packing_strategy == "wrapped" and (training.packing or training.eval_packing):
        raise InputError(
            "packing_strategy is wrapped, which cuts examples anywhere and lets them attend to each other;\n"
            "use bfd, TRL's default"
        )
    if training.padding_free and not training.packing and training.max_length is not None:
        raise InputError(
            f"padding_free is true, but without packing nothing is then cut off at max_length {training.max_length};\n"
            "use --packing true (which is padding-free, too), or --max_length none"
        )


def _quantization(args: TrainingPlan) -> str | None:
    """Return the option that asks for a quantized base model."""
    return next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(args.model, name)), None)


def _check_quantization(args: TrainingPlan, option: str) -> None:
    init, engine = args.sails.init, args.engine
    if not args.model.use_peft:
        raise InputError(
            f"{option} is true with --use_peft false, but rounded weights cannot be trained; leave one out"
        )
    # The base would be rounded once more, and PEFT has no orthogonal initialization on rounded weights.
    if not args.sails.initializer.exact or args.sails.initializer.trains_difference:
        raise InputError(f"--init {init} needs base weights that are not rounded; use another, or leave {option} out")
    if engine not in WHOLE_WEIGHTS:
        raise InputError(
            f"{option} is true, but quantized weights are trained on by one GPU or with DDP, and not with {engine};\n"
            "use accelerate_configs/multi_gpu.yaml (in 4 bits the model is small), or leave it out"
        )
    if args.model.load_in_4bit and args.model.dtype in (None, "auto"):
        raise InputError(
            f"dtype is {args.model.dtype}, but with load_in_4bit it is the type of matrix products and must be named;\n"
            "use --dtype bfloat16, or float32 without a GPU"
        )


def check_machine(args: TrainingPlan, config: PreTrainedConfig) -> None:
    """Refuse options that need what this machine lacks, or another kind of model, with an `InputError`."""
    if args.sails.initializer.trains_difference and getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"--init {args.sails.init} needs base weights that are not rounded, and {args.model_name} is published so; "
            "use another"
        )
    on_gpu, given = args.training.device.type != "cpu", args.training.model_init_kwargs or {}
    assert isinstance(given, dict)  # transformers has parsed it
    if (bits := _quantization(args)) and not is_bitsandbytes_available():
        raise InputError(f"{bits} needs bitsandbytes; pip install 'sails-align[performance]', or leave it out")
    if (name := args.model.attn_implementation or given.get("attn_implementation")) is not None:
        _check_attention(name, args, config, on_gpu=on_gpu)
    if given.get("use_kernels") and not is_kernels_available():
        raise InputError(
            "model_init_kwargs has use_kernels, which needs the package kernels; install it, or leave it out"
        )
    if args.training.use_liger_kernel:
        _check_liger(config, on_gpu=on_gpu)
    if args.training.activation_offloading and not on_gpu:
        raise InputError(
            "activation_offloading moves activations from a GPU to the CPU, and there is no GPU; leave it out"
        )


def _check_attention(name: str, args: TrainingPlan, config: PreTrainedConfig, *, on_gpu: bool) -> None:
    is_flash = is_flash_attention_requested(requested_attention_implementation=name)
    if exact_attention(config) == "eager" and not (is_flash or name in ("eager", "flex_attention")):
        raise InputError(
            f"attn_implementation is {name}, which leaves out the soft-capping of {config.model_type}: that would be "
            "another model\nthan the one the SAEs are of; use eager, or on a GPU flash_attention_2 or flex_attention"
        )
    if (is_flash or name == "flex_attention") and not on_gpu:
        raise InputError(f"attn_implementation is {name}, which trains on GPUs only; leave it out")
    if not is_flash:
        return
    installed = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if not is_kernels_available() and not (name in installed and installed[name]()):
        raise InputError(
            f"attn_implementation is {name}, but neither its package nor kernels, which fetches it from the hub, is "
            "installed;\npip install 'kernels>=0.16,<0.17' (or flash-attn --no-build-isolation), or leave it out"
        )
    old = name == "flash_attention_2" and is_flash_attn_2_available() and version("flash-attn")
    if old and exact_attention(config) == "eager" and Version(old) < Version(FLASH_WITH_SOFT_CAP):
        raise InputError(
            f"flash-attn {old} knows no soft-capping; install {FLASH_WITH_SOFT_CAP} or newer, or use eager"
        )
    half = args.training.bf16 or args.training.fp16 or args.model.dtype in ("bfloat16", "float16")
    if not half:
        raise InputError(f"attn_implementation is {name}, which computes in 16 bits; add --bf16 true, or leave it out")


def _check_liger(config: PreTrainedConfig, *, on_gpu: bool) -> None:
    if not on_gpu:
        raise InputError("use_liger_kernel needs a GPU, and there is none; leave it out")
    if not is_liger_kernel_available():
        raise InputError("use_liger_kernel needs liger-kernel; pip install 'sails-align[performance]', or leave it out")
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # transformers would only log it
        raise InputError(f"use_liger_kernel has no kernels for {config.model_type}; leave it out")
