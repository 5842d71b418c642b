"""The command `sails eval helpfulness`: how good a model's answers are, by themselves and against a reference's.

python eval/helpfulness.py --model runs/mine                                      right answers on the testbed
python eval/helpfulness.py --model M --prompts alpaca-eval --judge llm --judge_model ... --reference OTHER_MODEL

<output_dir>/responses.jsonl, reference.jsonl, verdicts.jsonl, metrics.json
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import content_hash, file_hash
from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.files import work_folder
from sails_align.evaluation.backends.make import find_spec, make_backend
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.evaluate import HELPFULNESS, OPTIONAL, evaluate
from sails_align.evaluation.judges.make import make_judges
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.judges.panel import fail_if_unscored
from sails_align.evaluation.options import PromptArguments, ReferenceArguments, ResponseArguments, RunArguments
from sails_align.evaluation.output import cache_file, output_folder
from sails_align.evaluation.pipeline import respond
from sails_align.evaluation.prompts.load import load_all
from sails_align.evaluation.records import Completion, Judge, Prompt
from sails_align.evaluation.tables import show_rates
from sails_align.steering import hook_of
from sails_align.steering.options import SteeringOptions

IN_SET = "set"
"""`--reference set`: the answers that come with the prompts."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> Mapping[str, Any]:
    """Parse, respond, judge, write. Returns what is in `metrics.json`. Harmful prompts are left out.

    Raises:
        InputError: for options, a model, prompts or a judge that cannot be used.
        SystemExit: with code 1 if more than `--max_unscored` of the verdicts are unscored.
    """
    line = CommandLine.read(argv)
    classes = [ResponseArguments, PromptArguments, JudgeArguments, RunArguments, ReferenceArguments, SteeringOptions]
    how, asked, who, run, against, steering = line.parse(classes, prog=prog)
    folder = output_folder(run, "helpfulness", how.model)
    options = {"retry_failed": run.retry_unscored, "progress": run.progress}
    with work_folder(folder), closing(Cache(cache_file(run))) as cache:
        prompts = [prompt for prompt in load_all(asked, how.seed, how.system_prompt) if prompt.kind != "harmful"]
        if not prompts:
            raise InputError("all prompts are harmful; add benign prompts, by --prompts")
        judges = make_judges(who, prompts)
        _check_judges(judges, against.reference)
        spec = find_spec(how)
        reference = _reference(against.reference, how, prompts, cache, options)
        result = evaluate(
            prompts,
            make_backend(how, spec, prompts, hook_of(steering)),
            judges,
            tasks=HELPFULNESS,
            sampling=how.sampling(prompts),
            reference=reference,
            cache=cache,
            folder=folder,
            provenance={
                "reference": _reference_identity(against.reference),
                "prompts": {"sets": asked.prompts, "n": len(prompts), "part": asked.part},
            },
            **options,
        )
        title = f"Helpfulness of {how.model}" + (f" against {against.reference}" if against.reference else "")
        show_rates(result.metrics, title, folder)
    fail_if_unscored(result.metrics["unscored"], run.max_unscored)
    return result.metrics


def _check_judges(judges: Mapping[str, Judge], reference: str | None) -> None:
    """Refuse judges that can be asked nothing about helpfulness, or not for a comparison that is wanted."""
    tasks = {task for judge in judges.values() for task in judge.tasks}
    wanted = {*OPTIONAL} if reference is None else {"preference"}
    if not tasks & wanted:
        names = ", ".join(judges)
        raise InputError(f"{names} cannot judge how helpful answers are; use --judge llm, or oracle on the testbed")


def _reference(
    name: str | None, how: ResponseArguments, prompts: Sequence[Prompt], cache: Cache, options: dict[str, bool]
) -> list[Completion] | None:
    """The reference's answers.

    Raises:
        InputError: if some prompts have none.
    """
    if name is None:
        return None
    if name == IN_SET:
        texts = [prompt.meta.get("reference") for prompt in prompts]
    elif name.endswith(".jsonl"):
        answers = _read_responses(Path(name))
        texts = [answers.get(_asked(prompt.messages)) for prompt in prompts]
    else:
        other = replace(how, model=name, base_model=None, revision=None, chat_template_path=None)
        with closing(make_backend(other, find_spec(other), prompts)) as backend:
            return respond(backend, prompts, how.sampling(prompts), cache, **options)
    lacking = [prompt.id for prompt, text in zip(prompts, texts, strict=True) if not text]
    if lacking:
        raise InputError(
            f"the reference {name} has no answer to {len(lacking)} of {len(prompts)} prompts, such as {lacking[0]};\n"
            "evaluate it on the same prompts first, or give a model"
        )
    return [Completion(text) for text in texts]


def _reference_identity(name: str | None) -> dict[str, Any] | None:
    """What the reference is: a name, and the hash of a file. Its answers are in reference.jsonl."""
    if name is None:
        return None
    return {"name": name, "sha256": file_hash(Path(name)) if name.endswith(".jsonl") else None}


def _asked(messages: Iterable[Mapping[str, str]]) -> str:
    """What was asked, as a key: ids of prompts may be the same in another set."""
    return content_hash([[message["role"], message["content"]] for message in messages])


def _read_responses(path: Path) -> dict[str, str]:
    """Answers by what was asked."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {_asked(row["messages"]): row["response"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"cannot read the answers in {path} ({type(error).__name__}: {error});\n"
            "give the responses.jsonl of an evaluation"
        ) from error
