"""The one evaluation: prompts, what answers them, and who judges the answers -> an `EvaluationResult`.

The commands (`sails eval`, `sails attack`), the testbed's measurement during training, the comparison's cells and the
Python API all call `evaluate`.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.core.artifacts import package_versions
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.judges.panel import Panel, unscored
from sails_align.evaluation.output import write_responses
from sails_align.evaluation.pipeline import respond
from sails_align.evaluation.records import (
    Backend,
    Completion,
    Item,
    Judge,
    Prompt,
    Sampling,
    Task,
    Verdict,
    Verdicts,
)
from sails_align.evaluation.result import VOTE, EvaluationResult

if TYPE_CHECKING:
    pass

SAFETY: tuple[Task, ...] = ("harm", "refusal", "correctness")
HELPFULNESS: tuple[Task, ...] = ("helpfulness", "correctness", "preference")
OPTIONAL: tuple[Task, ...] = ("correctness", "helpfulness")
"""Tasks that are left out where no judge can be asked for them."""


def evaluate(
    prompts: Sequence[Prompt],
    responses: Backend | Sequence[Completion],
    judges: Mapping[str, Judge],
    *,
    tasks: Sequence[Task] = SAFETY,
    sampling: Sampling | None = None,
    reference: Sequence[Completion] | None = None,
    cache: Cache | None = None,
    folder: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    retry_failed: bool = False,
    progress: bool = True,
) -> EvaluationResult:
    """Get responses to prompts, have them judged, and compute the metrics.

    Harmful prompts are judged for harm, all others for refusal, right answers, helpfulness and preference. Backend and
    judges are closed as soon as they are done: memory is for one model at a time.

    Args:
        prompts: what the model is asked.
        responses: what responds; or the responses, one for each prompt.
        judges: by name; several of them vote.
        tasks: what the judges are asked, as far as there are prompts for it.
        sampling: how responses are drawn.
        reference: answers to compare with (`preference`), one for each prompt.
        cache: of earlier responses and verdicts.
        folder: where responses.jsonl is written before anything is judged, and all files at the end; None: nowhere.
        provenance: what `metrics.json` says besides model, sampling and judges.
        retry_failed: ask again for what failed.
        progress: show bars.

    Raises:
        InputError: if a model, a judge or a prompt cannot be used.
    """
    sampling, made_by = sampling or Sampling(), {}
    panel = Panel(judges, cache, retry_failed=retry_failed, progress=progress)
    with closing(panel):
        if not isinstance(responses, Sequence):
            with closing(responses) as backend:
                made_by = {"model": backend.identity(), "sampling": asdict(sampling)}
                responses = respond(backend, prompts, sampling, cache, retry_failed=retry_failed, progress=progress)
        if folder is not None:
            write_responses(folder / "responses.jsonl", prompts, responses)
        verdicts: Verdicts = {
            task: _judge(panel, task, places, prompts, responses, reference)
            for task in tasks
            if (places := _places(panel, task, prompts, reference))
        }
        about = {
            "agreement": panel.agreement(verdicts),
            "unscored": unscored(verdicts),
            "notes": panel.notes(verdicts),
            "provenance": {
                **made_by,
                "judges": panel.identities(),
                **(provenance or {}),
                "versions": package_versions(),
            },
        }
    compared = None if reference is None else tuple(reference)
    binary = {**panel.members, VOTE: panel.binary}
    result = EvaluationResult(tuple(prompts), tuple(responses), verdicts, binary, compared, about)
    if folder is not None:
        result.save(folder)
    return result


def _places(panel: Panel, task: Task, prompts: Sequence[Prompt], reference: Any) -> list[int]:
    """Of the prompts that a task is for; none, if it is left out."""
    if (task in OPTIONAL and not panel.can(task)) or (task == "preference" and reference is None):
        return []
    return [place for place, prompt in enumerate(prompts) if (prompt.kind == "harmful") == (task == "harm")]


def _judge(
    panel: Panel,
    task: Task,
    places: Sequence[int],
    prompts: Sequence[Prompt],
    responses: Sequence[Completion],
    reference: Sequence[Completion] | None,
) -> dict[str, dict[int, Verdict]]:
    """Verdicts by judge and place; where there is no response (or none to compare with), they are unscored."""
    items: list[Item | None] = []
    for place in places:
        text = responses[place].text
        other = reference[place].text if reference is not None and task == "preference" else None
        is_lacking = text is None or (task == "preference" and other is None)
        items.append(None if is_lacking else Item(prompts[place], str(text), other))
    by_judge = panel.judge(task, items)
    return {name: dict(zip(places, of_judge, strict=True)) for name, of_judge in by_judge.items()}
