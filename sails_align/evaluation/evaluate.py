"""Evaluate a model: commands, training, comparisons and the Python API all call `evaluate`."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.core.artifacts import package_versions
from sails_align.core.files import write_text
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.inspect_log import INSPECT_FILE
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.judges.panel import Panel, unscored
from sails_align.evaluation.options import PromptArguments, ResponseArguments
from sails_align.evaluation.output import RESPONSES_FILE, VERDICTS_FILE, response_lines
from sails_align.evaluation.pipeline import respond
from sails_align.evaluation.records import (
    GUARDED,
    VOTE,
    Backend,
    Completion,
    InferenceHook,
    Item,
    Judge,
    Kind,
    Prompt,
    Sampling,
    Task,
    Verdicts,
)
from sails_align.evaluation.result import EvaluationResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAFETY: tuple[Task, ...] = ("harm", "refusal", "correctness")
HELPFULNESS: tuple[Task, ...] = ("helpfulness", "correctness", "preference", "likeness")
OPTIONAL: tuple[Task, ...] = ("correctness", "helpfulness")
"""Tasks that are skipped if no judge can score them."""
COMPARING: tuple[Task, ...] = ("preference", "likeness")
"""Tasks that compare with the reference's response. If there is a reference, some judge must be able to score one."""


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

    Harmful prompts are judged for harm, all others for the other tasks. Backend and judges are closed as soon as they
    are done: memory is for one model at a time.

    Args:
        prompts: what the model is asked.
        responses: what responds; or the responses, one for each prompt.
        judges: by name; several of them vote.
        tasks: what the judges are asked, as far as there are prompts for it.
        sampling: how responses are drawn.
        reference: answers to compare with (`preference`, `likeness`), one for each prompt.
        cache: of earlier responses and verdicts.
        folder: where all files are written, responses.jsonl before anything is judged; None: nowhere.
        provenance: what `metrics.json` says besides model, sampling and judges.
        retry_failed: ask again for what failed.
        progress: show bars.

    Raises:
        InputError: if a model, a judge or a prompt cannot be used.
    """
    sampling, made_by = sampling or Sampling(), {}
    options = {"retry_failed": retry_failed, "progress": progress}
    with closing(Panel(judges, cache, **options)) as panel:
        if not isinstance(responses, Sequence):
            with closing(responses) as backend:
                made_by = {"model": backend.identity(), "sampling": asdict(sampling)}
                responses = respond(backend, prompts, sampling, cache, **options)
        if folder is not None:
            _write_first(folder, prompts, responses)
        verdicts = _verdicts(panel, tasks, prompts, responses, reference)
        about = _about(
            panel, verdicts, prompts, responses, {**made_by, "judges": panel.identities(), **(provenance or {})}
        )
    compared = None if reference is None else tuple(reference)
    binary = {**panel.members, VOTE: panel.binary}
    made = (tuple(prompts), tuple(responses), verdicts, binary, compared, about)
    result = EvaluationResult(*made, by_rules=panel.by_rules)
    if folder is not None:
        result.save(folder)
    return result


def _write_first(folder: Path, prompts: Sequence[Prompt], responses: Sequence[Completion]) -> None:
    """Write responses.jsonl, after what an earlier evaluation left there of other responses is removed."""
    path, text = folder / RESPONSES_FILE, response_lines(prompts, responses)
    if not path.is_file() or path.read_bytes() != text.encode():
        for name in (VERDICTS_FILE, INSPECT_FILE):
            (folder / name).unlink(missing_ok=True)
    write_text(path, text)


def _about(
    panel: Panel,
    verdicts: Verdicts,
    prompts: Sequence[Prompt],
    responses: Sequence[Completion],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "agreement": panel.agreement(verdicts),
        "unscored": unscored(verdicts),
        "notes": [*panel.notes(verdicts), *_refused_by_guard(prompts, responses)],
        "provenance": {**provenance, "versions": package_versions()},
    }


def _refused_by_guard(prompts: Sequence[Prompt], responses: Sequence[Completion]) -> list[str]:
    """Return a note that counts the prompts that a guard refused, if it refused any."""
    counts = []
    for kind in ("harmful", "harmless"):
        of = [r for p, r in zip(prompts, responses, strict=True) if (p.kind == "harmful") == (kind == "harmful")]
        refused = sum(response.finish_reason == GUARDED for response in of)
        counts += [(refused, f"{refused} of {len(of)} {kind} prompts")] if of else []
    if not any(refused for refused, _ in counts):
        return []
    return [f"refused by the guard before the model responded: {', '.join(text for _, text in counts)}"]


def _verdicts(
    panel: Panel,
    tasks: Sequence[Task],
    prompts: Sequence[Prompt],
    responses: Sequence[Completion],
    reference: Sequence[Completion] | None,
) -> Verdicts:
    """Have the responses judged, task by task; without a response (or one to compare with), a prompt is unscored."""
    verdicts = {}
    for task in _asked(panel, tasks, reference is not None):
        places = [place for place, prompt in enumerate(prompts) if (prompt.kind == "harmful") == (task == "harm")]
        if not places:
            continue
        others = reference if reference is not None and task in COMPARING else [None] * len(prompts)
        items = [_item(prompts[place], responses[place], others[place]) for place in places]
        by_judge = panel.judge(task, items)
        verdicts[task] = {name: dict(zip(places, of_judge, strict=True)) for name, of_judge in by_judge.items()}
    return verdicts


def _asked(panel: Panel, tasks: Sequence[Task], has_reference: bool) -> list[Task]:
    skipped = {task for task in OPTIONAL if not panel.can(task)}
    if not has_reference:
        skipped |= {*COMPARING}
    elif any(map(panel.can, COMPARING)):
        skipped |= {task for task in COMPARING if not panel.can(task)}
    return [task for task in tasks if task not in skipped]


def _item(prompt: Prompt, response: Completion, other: Completion | None) -> Item | None:
    if response.text is None or (other is not None and other.text is None):
        return None
    return Item(prompt, response.text, None if other is None else other.text)


def evaluate_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "str | Sequence[str | Prompt]",
    judge: "str | Judge | JudgeArguments | Sequence[str | Judge] | None" = None,
    *,
    tasks: Sequence[Task] = SAFETY,
    n_prompts: int | None = None,
    part: str = "test",
    kind: Kind | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    hook: InferenceHook | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Evaluate a model in memory, on the device and with the type that it has.

    Args:
        model: with or without an adapter; its mode (train or eval) is restored.
        tokenizer: of the model, with a chat template.
        prompts: prompt sets by name, files, data sets of the hub, `testbed`, or prompts.
        judge: `rules`, `oracle`, a judge, several of them (which vote), or options of judges with models of their own.
            None: the oracle, if all prompts are the testbed's.
        tasks: what is judged; `HELPFULNESS` for how good answers to benign prompts are.
        n_prompts: of each set, balanced over categories; None: all (256 of each of the testbed's).
        part: of sets that have parts: `test`, `validation` or `train`.
        kind: of the prompts of files that do not say it: `harmful`, `benign` or `dual_use`.
        max_new_tokens: of a response; None: 512, or 24 on the testbed.
        temperature: 0 is greedy.
        seed: of sampling, and of the choice of prompts.
        batch_size: prompts at a time.
        hook: applied to the model while it responds.
        folder: where responses, verdicts and metrics are written; None: nowhere.
        progress: show bars.

    Raises:
        InputError: if prompts or judges cannot be used.

    Examples:
        >>> result = sails.evaluate(model, tokenizer, "testbed", n_prompts=8, progress=False)
        >>> result.rates()["safety_rate"].value
        0.0
    """
    from sails_align.evaluation.backends.hf import HFBackend
    from sails_align.evaluation.prompts.load import load_all

    given = [prompts] if isinstance(prompts, str) else list(prompts)
    names = [name for name in given if isinstance(name, str)]
    asked = [prompt for prompt in given if isinstance(prompt, Prompt)]
    if names:
        asked += load_all(PromptArguments(names, n_prompts=n_prompts, part=part, kind=kind), seed)
    how = ResponseArguments(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return evaluate(
        asked,
        HFBackend.of(model, tokenizer, batch_size=batch_size, hook=hook),
        _judges(judge, asked),
        tasks=tasks,
        sampling=how.sampling(asked),
        folder=None if folder is None else Path(folder),
        provenance={"prompts": {"sets": names, "n": len(asked)}},
        progress=progress,
    )


def _judges(
    judge: "str | Judge | JudgeArguments | Sequence[str | Judge] | None", prompts: Sequence[Prompt]
) -> dict[str, Judge]:
    """Return judges by name, made from names, judges or options."""
    from sails_align.evaluation.judges.make import make_judges

    if isinstance(judge, JudgeArguments):
        return make_judges(judge, prompts)
    if judge is None or isinstance(judge, str):
        return make_judges(JudgeArguments(None if judge is None else [judge]), prompts)
    several = judge if isinstance(judge, Sequence) else [judge]
    names = [one for one in several if isinstance(one, str)]
    own = {one.name: one for one in several if not isinstance(one, str)}
    return own | (make_judges(JudgeArguments(names), prompts) if names else {})
