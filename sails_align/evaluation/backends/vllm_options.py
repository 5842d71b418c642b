"""What vLLM must be told to compute what transformers and PEFT do."""

import json
from pathlib import Path
from typing import Any, get_args

from sails_align.core.errors import InputError
from sails_align.evaluation.records import Sampling
from sails_align.models.spec import ModelSpec

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of --max-lora-rank."""
NOISE_FACTOR = 3.0
"""An adapter must change log-probabilities by more than this times what a repetition does."""


def cannot_start(model: str, error: Exception) -> InputError:
    """What is to be said when vLLM does not start."""
    # A line that says it: pydantic's errors begin with their number, and end each with the input.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = next((line for line in lines if line.startswith("Value error")), lines[0])
    cause = line.removeprefix("Value error, ").partition(" [type=")[0]
    return InputError(
        f"vLLM cannot start with {model}: {cause}\nits own messages above say more; for want of memory, give a smaller "
        "--max_model_len or more GPUs (--tensor_parallel_size); or use --backend hf"
    )


def max_lora_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank that takes a rank; None if there is none."""
    return next((allowed for allowed in MAX_LORA_RANKS if allowed >= rank), None)


def sampling_params(sampling: Sampling) -> Any:
    """vLLM's form of a sampling; each conversation is drawn with the seed, whatever is beside it in a batch."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore[reportMissingImports]

    schema = None if sampling.schema is None else StructuredOutputsParams(json=dict(sampling.schema))
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed if sampling.temperature > 0 else None,
        structured_outputs=schema,
    )


def weights_dtype(spec: ModelSpec) -> str:
    """The type to load weights in: vLLM's own `auto` makes 16 bits of 32."""
    if spec.dtype != "auto":
        return spec.dtype
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(spec.base, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        raise InputError(f"cannot load the model {spec.base}: {cause}\ncheck the name") from error
    return checkpoint_dtype(config)


def checkpoint_dtype(config: Any) -> str:
    """The type that a model's configuration says its weights have."""
    dtype = config.dtype or config.get_text_config(decoder=True).dtype
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def lora_options(folder: Path, dtype: str) -> dict[str, Any]:
    """What the engine must be told to take an adapter.

    Raises:
        InputError: if it cannot: the rank is too high, or the type is not one that its kernels have on a GPU.
    """
    from vllm.config.lora import MaxLoRARanks  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    try:
        rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no LoRA adapter that can be read ({error!r}); copy it again") from error
    allowed = next((allowed for allowed in sorted(get_args(MaxLoRARanks)) if allowed >= rank), None)
    if allowed is None:
        raise InputError(f"the adapter {folder} has rank {rank}, which vLLM does not take; merge it (sails merge)")
    if dtype == "float32" and not current_platform.is_cpu():
        raise InputError(
            "the model is float32, and on GPUs vLLM computes adapters in 16 bits;\n"
            "give --dtype bfloat16, or merge the adapter (sails merge)"
        )
    return {"enable_lora": True, "max_lora_rank": allowed}


def is_zero(folder: Path) -> bool:
    """Whether an adapter changes nothing: in each module, each of its ranks is zero on one side."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except OSError as error:
        raise InputError(f"the weights of {folder} cannot be read: {error}; copy the adapter again") from error
    return not any(
        (A_RI.abs().sum(1) * tensors[name.replace(".lora_A.", ".lora_B.")].abs().sum(0)).any()
        for name, A_RI in tensors.items()
        if ".lora_A." in name
    )
