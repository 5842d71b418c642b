"""Options with which vLLM computes what transformers and PEFT do, and a check that it applies the adapter."""

from pathlib import Path
from typing import Any

from sails_align.core.errors import InputError
from sails_align.models.adapters import read_adapter
from sails_align.models.load import load_config
from sails_align.models.spec import ModelSpec

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of --max-lora-rank."""
NOISE_FACTOR = 3.0
"""An adapter must change log-probabilities by more than this times the difference between two equal runs."""


def cannot_start(model: str, error: Exception) -> InputError:
    """Return the error to raise when vLLM does not start."""
    # pydantic's errors begin with their number, and end each with the input.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = next((line for line in lines if line.startswith("Value error")), lines[0])
    cause = line.removeprefix("Value error, ").partition(" [type=")[0]
    return InputError(
        f"vLLM cannot start with {model}: {cause}\nsee its own messages above; if memory is short, give a smaller "
        "--max_model_len or more GPUs (--tensor_parallel_size); or use --backend hf"
    )


def max_lora_rank(rank: int) -> int | None:
    """Return the smallest --max-lora-rank that takes a rank; None if there is none."""
    return next((allowed for allowed in MAX_LORA_RANKS if allowed >= rank), None)


def engine_options(spec: ModelSpec) -> dict[str, Any]:
    """Return the options of vLLM's `LLM` that say how to load a model and its adapter (see also `serving`).

    Raises `InputError` if there is no such model, or vLLM's kernels for adapters do not have the type of the weights.
    """
    options = {
        "tokenizer": spec.tokenizer,
        "revision": spec.revision,
        "tokenizer_revision": spec.revision if spec.tokenizer == spec.base else None,
        "trust_remote_code": spec.trust_remote_code,
        "dtype": _weights_dtype(spec),
        "generation_config": "vllm",  # of the model's own file only the EOS tokens: see `models.generation`
    }
    if spec.adapter is None:
        return options
    if options["dtype"] == "float32" and not _runs_on_cpu():
        raise InputError(
            "the model is float32, and on GPUs vLLM computes adapters in 16 bits;\n"
            "give --dtype bfloat16, or merge the adapter (sails merge)"
        )
    rank = read_adapter(Path(spec.adapter)).config.r
    return options | {"enable_lora": True, "max_lora_rank": max_lora_rank(rank)}


def _runs_on_cpu() -> bool:
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    return current_platform.is_cpu()


def _weights_dtype(spec: ModelSpec) -> str:
    """Return the type to load weights in. For `auto` the checkpoint's own: vLLM's `auto` converts 32 bits to 16."""
    if spec.dtype != "auto":
        return spec.dtype
    config = load_config(spec.base, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    dtype = config.dtype or config.get_text_config(decoder=True).dtype
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def adapter_effect(llm: Any, prompts: list[list[int]], lora_request: Any) -> float:
    """Return the largest change by an adapter of a prompt token's log-probability; 0 if equal runs differ as much.

    Texts would not tell: an adapter that was trained very little may leave all greedy texts as they are.

    Args:
        llm: vLLM's `LLM`.
        prompts: token ids, two or more each.
        lora_request: the adapter.
    """
    base, again = _log_probabilities(llm, prompts, None), _log_probabilities(llm, prompts, None)
    adapted = _log_probabilities(llm, prompts, lora_request)
    noise = max(abs(a - b) for a, b in zip(base, again, strict=True))  # kernels of 16 bits have some
    effect = max(abs(a - b) for a, b in zip(base, adapted, strict=True))
    return effect if effect > NOISE_FACTOR * noise else 0.0


def _log_probabilities(llm: Any, prompts: list[list[int]], lora_request: Any) -> list[float]:
    """Return those of all tokens of all prompts but the first of each."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
        lora_request=lora_request,
    )
    return [
        of_token[token].logprob
        for output, ids in zip(outputs, prompts, strict=True)
        for token, of_token in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
