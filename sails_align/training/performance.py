"""Options of speed and memory: those that contradict each other, and those that this machine or model cannot do.

TRL, PEFT and transformers take some of them without a word, and do nothing or something else; others they refuse only
after the subspace is found.
"""

from importlib.metadata import version
from typing import Any

from packaging.version import Version
from transformers import PreTrainedConfig
from transformers.utils import (
    is_bitsandbytes_available,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
    is_liger_kernel_available,
)
from transformers.utils.generic import is_flash_attention_requested
from trl import SFTConfig

from sails_align.core.errors import InputError
from sails_align.models.attention import exact_attention
from sails_align.training.plan import TrainingPlan

FLASH_WITH_SOFT_CAP = "2.6"
"""The first version of flash-attn with a soft-cap; transformers leaves it out with an older one."""


def check_options(args: TrainingPlan) -> None:
    """Refuse options that contradict each other, on whatever machine.

    Raises:
        InputError: then.
    """
    if bits := _quantization(args):
        _check_quantization(args, bits)
    training: Any = args.training
    selective = (training.gradient_checkpointing_kwargs or {}).get("selective")
    if args.method == "dpo" and training.padding_free:
        raise InputError("padding_free is true, but TRL's DPO pads all the same; leave it out")
    if args.method == "dpo" and selective:
        raise InputError("gradient_checkpointing_kwargs has selective, which TRL has for SFT only; leave it out")
    if not isinstance(training, SFTConfig):
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
    """The option that asks for a base model of few bits."""
    return next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(args.model, name)), None)


def _check_quantization(args: TrainingPlan, option: str) -> None:
    init, engine = args.sails.init, args.engine
    if not args.model.use_peft:
        raise InputError(
            f"{option} is true with --use_peft false, but rounded weights cannot be trained; leave one out"
        )
    if (
        not args.sails.initializer.exact
    ):  # the base would be rounded once more; PEFT has no orthogonal one on rounded weights
        raise InputError(f"--init {init} needs base weights that are not rounded; use another, or leave {option} out")
    if engine not in ("single", "ddp"):
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
    """Refuse options that need what this machine lacks, or a model of another kind.

    Raises:
        InputError: then.
    """
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
