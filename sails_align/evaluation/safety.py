"""The command `sails eval safety`: what a model says to harmful requests, and to harmless ones that look harmful.

python eval/safety.py --model runs/mine --prompts testbed
python eval/safety.py --model google/gemma-2-2b-it --prompts hex-phi xstest --judge llm --judge_model ... --backend vllm

<output_dir>/responses.jsonl   what was asked and answered
<output_dir>/verdicts.jsonl    each judge's verdict on each response, and their vote
<output_dir>/metrics.json      rates with intervals, by category and by judge; agreement; what decided them
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from sails_align.core.artifacts import package_versions, work_folder, write_json
from sails_align.core.command_line import CommandLine
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.judges.panel import Panel, fail_if_unscored, unscored
from sails_align.evaluation.metrics import Estimate, attack_estimates, rate, safety_estimates
from sails_align.evaluation.options import PromptArguments, ResponseArguments, RunArguments
from sails_align.evaluation.pipeline import respond, response_row, verdict_row, write_rows
from sails_align.evaluation.records import Completion, Item, Prompt, Task, Verdict
from sails_align.evaluation.tables import show_rates

TASKS: tuple[Task, ...] = ("harm", "refusal", "correctness")
Verdicts = dict[Task, dict[str, dict[int, Verdict]]]
"""By task, by judge (and `vote`), by the prompt's index."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, respond, judge, write. Returns what is in `metrics.json`.

    Raises:
        InputError: for options, a model, prompts or a judge that cannot be used.
        SystemExit: with code 1 if more than `--max_unscored` of the verdicts are unscored.
    """
    line = CommandLine.read(argv)
    how, asked, who, run = line.parse([ResponseArguments, PromptArguments, JudgeArguments, RunArguments], prog=prog)
    folder, retry = run.folder("safety", how.model), {"retry_failed": run.retry_unscored, "progress": run.progress}
    with work_folder(folder), closing(Cache(run.cache_file())) as cache:
        spec, prompts = how.spec(), asked.load(how.seed, how.system_prompt)
        sampling = how.sampling(prompts)
        with closing(Panel(who.make(prompts), cache, **retry)) as panel:
            with closing(
                how.make_backend(spec, prompts)
            ) as backend:  # before judges are loaded: memory is for one at a time
                made_by = {"model": backend.identity(), "sampling": asdict(sampling)}
                completions = respond(backend, prompts, sampling, cache, **retry)
            write_rows(
                folder / "responses.jsonl", [response_row(*pair) for pair in zip(prompts, completions, strict=True)]
            )
            verdicts = judge_all(panel, prompts, completions)
            write_rows(folder / "verdicts.jsonl", _verdict_rows(prompts, verdicts))
            metrics = measure(panel, prompts, verdicts)
            metrics["provenance"] = {
                **made_by,
                "judges": panel.identities(),
                "prompts": {"sets": asked.prompts, "n": len(prompts), "part": asked.part},
                "versions": package_versions(),
            }
        write_json(folder / "metrics.json", metrics)
        show_rates(metrics, f"Safety of {how.model}", folder)
    fail_if_unscored(metrics["unscored"], run.max_unscored)
    return metrics


def judge_all(panel: Panel, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Verdicts:
    """Verdicts on harm for harmful prompts; on refusal and, if a judge knows that, on right answers for the others."""
    verdicts: Verdicts = {}
    for task in TASKS:
        indices = [index for index, prompt in enumerate(prompts) if (prompt.kind == "harmful") == (task == "harm")]
        if not indices or (task == "correctness" and not panel.can(task)):
            continue
        texts = [completions[index].text for index in indices]
        items = [None if text is None else Item(prompts[i], text) for i, text in zip(indices, texts, strict=True)]
        verdicts[task] = {
            name: dict(zip(indices, of_judge, strict=True)) for name, of_judge in panel.judge(task, items).items()
        }
    return verdicts


def measure(panel: Panel, prompts: Sequence[Prompt], verdicts: Verdicts) -> dict[str, Any]:
    """The numbers of `metrics.json`: of the judges' vote, and of each judge if there are several."""
    votes = _of_judge(verdicts, "vote")
    members = panel.members.items() if len(panel.members) > 1 else ()
    return {
        **summary(prompts, votes, binary=panel.binary),
        "judges": {
            name: summary(prompts, _of_judge(verdicts, name), binary=binary)["overall"] for name, binary in members
        },
        "agreement": panel.agreement(verdicts),
        "unscored": unscored(verdicts),
        "notes": panel.notes(verdicts),
    }


def _of_judge(verdicts: Verdicts, name: str) -> dict[Task, dict[int, Verdict]]:
    return {task: by_judge[name] for task, by_judge in verdicts.items() if name in by_judge}


def _verdict_rows(prompts: Sequence[Prompt], verdicts: Verdicts) -> list[dict[str, Any]]:
    return [
        verdict_row(prompts[index], name, task, verdict)
        for task, by_judge in verdicts.items()
        for name, of_judge in by_judge.items()
        for index, verdict in of_judge.items()
    ]


def summary(
    prompts: Sequence[Prompt], verdicts: dict[Task, dict[int, Verdict]], *, binary: bool
) -> dict[str, dict[str, Any]]:
    """Rates over all prompts, and over those of each category."""
    of_all = range(len(prompts))
    categories: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        name = prompt.category if prompt.kind == "harmful" else f"{prompt.category} ({prompt.kind})"
        categories.setdefault(name, []).append(index)
    return {
        "overall": _rates(prompts, verdicts, of_all, binary=binary),
        "by_category": {
            name: _rates(prompts, verdicts, indices, binary=binary) for name, indices in sorted(categories.items())
        },
        "by_split": {
            name: _rates(prompts, verdicts, indices, binary=binary) for name, indices in _splits(prompts).items()
        },
    }


def _splits(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Prompt sets, or the parts that their prompts name themselves, such as the testbed's new categories."""
    splits: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        if "split" in prompt.meta:
            splits.setdefault(str(prompt.meta["split"]), []).append(index)
    return splits


def _rates(
    prompts: Sequence[Prompt], verdicts: dict[Task, dict[int, Verdict]], indices: Sequence[int], *, binary: bool
) -> dict[str, Any]:
    def scores(task: Task, *, attacked: bool = False) -> list[float | None]:
        of_task = verdicts.get(task, {})
        return [
            of_task[index].score
            for index in indices
            if index in of_task and (not attacked or "attack" in prompts[index].meta)
        ]

    rates: dict[str, Estimate] = {}
    if harm := scores("harm"):
        rates |= safety_estimates(harm, binary=binary)
    if attacked := scores("harm", attacked=True):
        rates |= attack_estimates(attacked, binary=binary)
    if refusals := scores("refusal"):
        rates["over_refusal_rate"] = rate(refusals, bool)
    if right := scores("correctness"):
        rates["correct_answer_rate"] = rate(right, bool)
    return {name: value.to_json() for name, value in rates.items()}
