"""The command `sails eval helpfulness`: how good a model's answers are, by themselves and against a reference's.

python eval/helpfulness.py --model runs/mine                                      right answers on the testbed
python eval/helpfulness.py --model M --prompts alpaca-eval --judge llm --judge_model ... --reference OTHER_MODEL

<output_dir>/responses.jsonl, reference.jsonl, verdicts.jsonl, metrics.json
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import content_hash, file_hash, package_versions, work_folder, write_json
from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.judges.panel import Panel, fail_if_unscored, unscored
from sails_align.evaluation.metrics import Estimate, estimate, rate
from sails_align.evaluation.options import PromptArguments, ResponseArguments, RunArguments
from sails_align.evaluation.pipeline import respond, response_row, verdict_row, write_rows
from sails_align.evaluation.records import Completion, Item, Prompt, Task, Verdict
from sails_align.evaluation.tables import show_rates

ALONE: tuple[Task, ...] = ("helpfulness", "correctness")
"""Tasks without a reference."""
IN_SET = "set"
"""`--reference set`: the answers that come with the prompts."""


@dataclass
class ReferenceArguments:
    """What the answers are compared with."""

    reference: str | None = field(
        default=None,
        metadata={
            "help": "Whose answers to compare with, each pair judged in both orders: a model (as --model, same "
            "backend), a responses.jsonl of an earlier evaluation, or `set` for the answers that come with the prompts."
        },
    )


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, respond, judge, write. Returns what is in `metrics.json`. Harmful prompts are left out.

    Raises:
        InputError: for options, a model, prompts or a judge that cannot be used.
        SystemExit: with code 1 if more than `--max_unscored` of the verdicts are unscored.
    """
    line = CommandLine.read(argv)
    classes = [ResponseArguments, PromptArguments, JudgeArguments, RunArguments, ReferenceArguments]
    how, asked, who, run, against = line.parse(classes, prog=prog)
    folder = run.folder("helpfulness", how.model)
    options = {"retry_failed": run.retry_unscored, "progress": run.progress}
    with work_folder(folder), closing(Cache(run.cache_file())) as cache:
        prompts = [prompt for prompt in asked.load(how.seed, how.system_prompt) if prompt.kind != "harmful"]
        if not prompts:
            raise InputError("none of the prompts is harmless, so there is nothing to be helpful with; see --prompts")
        with closing(Panel(who.make(prompts), cache, **options)) as panel:
            tasks = _tasks(panel, against.reference)
            identity, completions = _answers(how, prompts, cache, options)
            others = _reference(against.reference, how, prompts, cache, options)
            verdicts: dict[Task, dict[str, list[Verdict]]] = {
                task: panel.judge(task, _items(task, prompts, completions, others)) for task in tasks
            }
            judges = panel.identities()
            agreement = panel.agreement(_indexed(verdicts))
        votes: dict[Task, list[Verdict]] = {task: by_judge["vote"] for task, by_judge in verdicts.items()}
        _write_rows(folder, prompts, completions, others, verdicts)
        metrics = {
            **summary(prompts, votes),
            "agreement": agreement,
            "unscored": unscored(_indexed(verdicts)),
            "provenance": {
                "model": identity,
                "sampling": asdict(how.sampling(prompts)),
                "reference": _reference_identity(against.reference),
                "judges": judges,
                "prompts": {"sets": asked.prompts, "n": len(prompts), "part": asked.part},
                "versions": package_versions(),
            },
        }
        write_json(folder / "metrics.json", metrics)
        title = f"Helpfulness of {how.model}" + (f" against {against.reference}" if against.reference else "")
        show_rates(metrics, title, folder)
    fail_if_unscored(metrics["unscored"], run.max_unscored)
    return metrics


def _tasks(panel: Panel, reference: str | None) -> list[Task]:
    """What the judges are asked.

    Raises:
        InputError: if they can be asked nothing about helpfulness, or not for a comparison that is wanted.
    """
    tasks: list[Task] = [task for task in ALONE if panel.can(task)]
    if reference is not None:
        tasks.append("preference")
    if not tasks or (reference is not None and not panel.can("preference")):
        names = ", ".join(panel.members)
        raise InputError(f"{names} cannot judge how helpful answers are; use --judge llm, or oracle on the testbed")
    return tasks


def _answers(
    how: ResponseArguments, prompts: Sequence[Prompt], cache: Cache, options: dict[str, bool]
) -> tuple[dict[str, Any], list[Completion]]:
    with closing(how.make_backend(how.spec(), prompts)) as backend:
        return backend.identity(), respond(backend, prompts, how.sampling(prompts), cache, **options)


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
        return _answers(other, prompts, cache, options)[1]
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


def _items(
    task: Task, prompts: Sequence[Prompt], completions: Sequence[Completion], others: Sequence[Completion] | None
) -> list[Item | None]:
    items: list[Item | None] = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        other = others[index].text if others is not None and task == "preference" else None
        lacks = completion.text is None or (task == "preference" and other is None)
        items.append(None if lacks else Item(prompt, str(completion.text), other))
    return items


def _indexed(verdicts: dict[Any, dict[str, list[Verdict]]]) -> dict[Any, dict[Any, dict[int, Verdict]]]:
    return {
        task: {name: dict(enumerate(of_judge)) for name, of_judge in by_judge.items()}
        for task, by_judge in verdicts.items()
    }


def _write_rows(
    folder: Path,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    others: Sequence[Completion] | None,
    verdicts: dict[Task, dict[str, list[Verdict]]],
) -> None:
    write_rows(folder / "responses.jsonl", [response_row(*pair) for pair in zip(prompts, completions, strict=True)])
    if others is not None:
        write_rows(folder / "reference.jsonl", [response_row(*pair) for pair in zip(prompts, others, strict=True)])
    rows = [
        verdict_row(prompt, name, task, verdict)
        for task, by_judge in verdicts.items()
        for name, of_judge in by_judge.items()
        for prompt, verdict in zip(prompts, of_judge, strict=True)
    ]
    write_rows(folder / "verdicts.jsonl", rows)


def summary(prompts: Sequence[Prompt], votes: dict[Task, list[Verdict]]) -> dict[str, Any]:
    """Mean score, win rate (a tie counts half) and share of right answers: of all prompts, and by category."""
    categories: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        categories.setdefault(prompt.category, []).append(index)
    by_category = {name: _rates(votes, indices) for name, indices in sorted(categories.items())}
    return {"overall": _rates(votes, range(len(prompts))), "by_category": by_category}


def _rates(votes: dict[Task, list[Verdict]], indices: Sequence[int]) -> dict[str, Any]:
    scores = {task: [verdicts[index].score for index in indices] for task, verdicts in votes.items()}
    rates: dict[str, Estimate] = {}
    if "helpfulness" in scores:
        rates["helpfulness"] = estimate(scores["helpfulness"], span=(1.0, 10.0))
    if "preference" in scores:
        rates["win_rate"] = estimate(scores["preference"])
    if "correctness" in scores:
        rates["correct_answer_rate"] = rate(scores["correctness"], bool)
    return {name: value.to_json() for name, value in rates.items()}
