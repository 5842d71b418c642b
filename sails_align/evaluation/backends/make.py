"""Make backends from options."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sails_align.core.errors import InputError
from sails_align.data.tokens import read_chat_template, turn_openers
from sails_align.evaluation.backends.adapter_check import CheckedBackend
from sails_align.evaluation.backends.stops import openers_of_template
from sails_align.evaluation.options import ResponseArguments
from sails_align.evaluation.records import Backend, InferenceHook, Prompt
from sails_align.models.load import load_tokenizer
from sails_align.models.resolve import resolve_model
from sails_align.models.spec import ModelSpec

if TYPE_CHECKING:
    from sails_align.guards.guard import Guard


def find_spec(how: ResponseArguments) -> ModelSpec | None:
    """Find the model that runs in this process; None if a server runs it.

    Raises `InputError` if there is no such model.
    """
    if how.backend == "openai":
        return None
    given = {"dtype": how.dtype, "revision": how.revision, "trust_remote_code": how.trust_remote_code}
    template = None if how.chat_template_path is None else read_chat_template(how.chat_template_path)
    return resolve_model(how.model, how.base_model, **given).with_chat_template(template)


def make_backend(
    how: ResponseArguments, spec: ModelSpec | None, prompts: Sequence[Prompt], hook: InferenceHook | None = None
) -> Backend:
    """Make what responds to the prompts. Models in this process are loaded with the first request.

    Args:
        how: the options.
        spec: of `find_spec`.
        prompts: that may be asked.
        hook: applied to the model while it responds.

    Raises:
        InputError: if the backend cannot serve the adapter, or cannot apply the hook; or if the guard is of another
            model, or not calibrated.
    """
    if how.clade_oracle:
        if hook is not None:
            raise InputError("clade_oracle is true, and the model is steered; leave one of them out")
        from sails_align.evaluation.backends.known_classes import known_classes

        hook = known_classes(spec, prompts)
    if hook is not None and how.backend != "hf":
        raise InputError(
            f"a hook cannot be applied with backend {how.backend!r}, whose activations are out of reach;\n"
            "use --backend hf"
        )
    if spec is not None:
        sizes = {"tensor_parallel_size": how.tensor_parallel_size, "max_model_len": how.max_model_len}
        return in_process(spec, how.backend, how.batch_size, **sizes, hook=hook, guard=_guard_of(how, spec))
    served = _served(how, how.model)
    if how.base_model is None:
        return served
    return CheckedBackend(served, _served(how, how.base_model), [prompt.messages for prompt in prompts])


def _guard_of(how: ResponseArguments, spec: ModelSpec) -> "Guard | None":
    if how.guard is None:
        return None
    from sails_align.guards.guard import Guard

    guard = Guard.load(Path(how.guard))
    guard.check_model(spec)
    assert guard.calibrated is not None  # which raises before anything is loaded
    return guard


def _served(how: ResponseArguments, model: str) -> Backend:
    from sails_align.evaluation.backends.openai import OpenAIBackend

    assert how.base_url is not None
    options = {"api_key_env": how.api_key_env, "concurrency": how.concurrency, "timeout": how.timeout}
    return OpenAIBackend(how.base_url, model, stops=_stop_texts(how, model), **options)


def _stop_texts(how: ResponseArguments, model: str) -> list[str]:
    """Return the texts that end a response as if the server's model ran here, as far as its template is known."""
    if how.server_template is not None:
        return openers_of_template(read_chat_template(how.server_template))
    try:  # vLLM and `transformers serve` call a model by its folder
        tokenizer = load_tokenizer(model) if Path(model).is_dir() else None
        return [] if tokenizer is None or not tokenizer.chat_template else turn_openers(tokenizer)
    except InputError:
        return []


def in_process(
    spec: ModelSpec,
    backend: str,
    batch_size: int = 32,
    tensor_parallel_size: int = 1,
    max_model_len: int | None = None,
    hook: InferenceHook | None = None,
    guard: "Guard | None" = None,
) -> Backend:
    """Make the backend of a model in this process; raise `InputError` if vLLM cannot serve the adapter."""
    if backend == "hf":
        from sails_align.evaluation.backends.hf import HFBackend

        return HFBackend(spec, batch_size=batch_size, hook=hook, guard=guard)
    from sails_align.evaluation.backends.serving import check_serving
    from sails_align.evaluation.backends.vllm_backend import VLLMBackend

    check_serving(spec)
    sizes = {"tensor_parallel_size": tensor_parallel_size, "max_model_len": max_model_len}
    return VLLMBackend(spec, **sizes, chunk_size=8 * batch_size)
