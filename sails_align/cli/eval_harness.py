"""The command `sails eval harness`: capability by lm-eval-harness, and how far it is from the base model's.

python eval/harness.py --model runs/mine --tasks testbed                        # an adapter against its base
python eval/harness.py --model google/gemma-2-2b-it --base google/gemma-2-2b --tasks mmlu,gsm8k --backend vllm

<output_dir>/metrics.json    each task's scores, the base's, and the differences with 95% intervals; what decided them
<output_dir>/samples.jsonl   what was asked and answered, of the model and the base
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.files import refuse_trained, work_folder, write_json
from sails_align.evaluation.backends.make import check_serving
from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.harness.report import report, sample_rows, show
from sails_align.evaluation.harness.run import Settings, run_harness
from sails_align.evaluation.output import default_folder, write_rows
from sails_align.models.load import load_spec_tokenizer
from sails_align.models.resolve import resolve_model
from sails_align.models.spec import ModelSpec
from sails_align.testbed.build import is_testbed, resolve_testbed
from sails_align.testbed.tasks import CHANCE, GROUP, write_tasks
from sails_align.testbed.world import World


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, run the model and its base, compare, write. Returns what is in `metrics.json`.

    Raises:
        InputError: for options, models or tasks that cannot be used.
    """
    (args,) = CommandLine.read(argv).parse([HarnessArguments], prog=prog)
    folder = refuse_trained(Path(args.output_dir or default_folder("harness", args.model)))
    with work_folder(folder):
        spec = resolve_model(
            args.model,
            args.base_model,
            dtype=args.dtype,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
        )
        if args.backend == "vllm":
            check_serving(spec)
        base_spec = find_base(args, spec)
        with _include_paths(args, spec) as include_paths:
            settings = settings_of(args, include_paths)
            result = run_harness(spec, settings)
            # the base is asked as the model was
            settings = replace(settings, apply_chat_template=result.setup["chat_template"])
            base = None if base_spec is None else run_harness(base_spec, settings)
        options = {name: value for name, value in vars(args).items() if name != "output_dir"}
        compared = None if base is None or base_spec is None else (base_spec, base)
        metrics = report(options, (spec, result), compared, CHANCE)
        write_rows(folder / "samples.jsonl", [*sample_rows("model", result), *sample_rows("base", base)])
        write_json(folder / "metrics.json", metrics)
        show(metrics, args.model, folder)
    return metrics


def settings_of(args: HarnessArguments, include_paths: tuple[str, ...]) -> Settings:
    """How the tasks are run."""
    chat_template = {"auto": "auto", "true": True, "false": False}[args.apply_chat_template]
    return Settings(
        tasks=tuple(args.tasks),
        backend="vllm" if args.backend == "vllm" else "hf",
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size="auto" if args.batch_size == "auto" else int(args.batch_size),
        apply_chat_template=chat_template,  # pyright: ignore[reportArgumentType] -- a text that is not auto
        fewshot_as_multiturn=args.fewshot_as_multiturn,
        system_instruction=args.system_instruction,
        include_paths=include_paths,
        seed=args.seed,
        device=args.device,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=args.max_model_len,
    )


def find_base(args: HarnessArguments, spec: ModelSpec) -> ModelSpec | None:
    """The model to compare with, that gets the tokenizer (so the chat template) of the other one where words are equal.

    Raises:
        InputError: if there is no such model.
    """
    if args.base == "none" or (args.base is None and spec.adapter is None):
        return None
    if args.base is not None:
        base = resolve_model(args.base, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    else:
        base = replace(spec, name=spec.base, adapter=None, tokenizer=spec.base, identity=spec.identity["base"])
    same_words = load_spec_tokenizer(base).get_vocab() == load_spec_tokenizer(spec).get_vocab()
    return replace(base, tokenizer=spec.tokenizer) if same_words else base


@contextmanager
def _include_paths(args: HarnessArguments, spec: ModelSpec) -> Iterator[tuple[str, ...]]:
    """The user's folder of tasks, and one with the testbed's, if they are asked for."""
    own = () if args.include_path is None else (args.include_path,)
    if not {GROUP, *CHANCE} & set(args.tasks) and not is_testbed(str(Path(spec.base).parent)):
        yield own
        return
    with tempfile.TemporaryDirectory(prefix="sails-tasks-") as folder:
        write_tasks(find_world(args, spec), Path(folder))
        yield (*own, folder)


def find_world(args: HarnessArguments, spec: ModelSpec) -> World:
    """Whose facts are asked for.

    Raises:
        InputError: if the model is not known to be of a testbed, and none is named.
    """
    if args.testbed is not None:
        if not is_testbed(args.testbed):
            raise InputError(f"testbed is {args.testbed!r}; give testbed, testbed:N or a testbed's folder")
        return resolve_testbed(args.testbed).world
    folder = str(Path(spec.base).parent)
    if not is_testbed(folder):
        raise InputError(
            f"the testbed's tasks ask for facts of a testbed's world, and {spec.base} is not one's model;\n"
            "for a merged or fully trained one say which: --testbed testbed (or testbed:N, or a folder)"
        )
    return resolve_testbed(folder).world
