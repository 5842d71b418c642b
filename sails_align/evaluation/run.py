"""Run the evaluation of a command: `sails eval safety` or `sails eval helpfulness`.

<output_dir>/responses.jsonl   prompts and responses
<output_dir>/reference.jsonl   the responses to compare with, if there is a reference
<output_dir>/verdicts.jsonl    the verdict of each judge on each response, and their vote
<output_dir>/metrics.json      rates with intervals, by category and by judge; agreement; provenance
<output_dir>/inspect.eval      all of this as a log of inspect_ai, if it is installed

With `--compare`, `compared.py` has the other model's.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from sails_align.core.earlier import check_earlier, write_record
from sails_align.core.errors import InputError
from sails_align.core.files import work_folder, write_json
from sails_align.core.log import LOG_FILE, Stages, log_file, say
from sails_align.core.options import all_but
from sails_align.evaluation.backends.make import find_spec, make_backend
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.compared import BASE, Responder, compared_with, comparison_of
from sails_align.evaluation.evaluate import COMPARING, HELPFULNESS, OPTIONAL, SAFETY, evaluate
from sails_align.evaluation.inspect_log import INSPECT_FILE
from sails_align.evaluation.judges.make import make_judges
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.judges.panel import fail_if_unscored, identities
from sails_align.evaluation.options import NOT_IN_IDENTITY, PromptArguments, ResponseArguments, RunArguments
from sails_align.evaluation.output import (
    COMPARED,
    COMPARISON_FILE,
    METRICS_FILE,
    cache_file,
    output_folder,
    prompts_hash,
)
from sails_align.evaluation.prompts.load import counted, load_all
from sails_align.evaluation.records import Backend, Judge, Prompt
from sails_align.evaluation.reference import reference_answers, reference_identity
from sails_align.evaluation.result import EvaluationResult
from sails_align.evaluation.tables import show_comparison, show_rates
from sails_align.evaluation.tracking import send
from sails_align.steering import hook_of
from sails_align.steering.options import SteeringOptions

TASKS = {"safety": SAFETY, "helpfulness": HELPFULNESS}


def run_evaluation(
    command: Literal["safety", "helpfulness"],
    how: ResponseArguments,
    asked: PromptArguments,
    who: JudgeArguments,
    run: RunArguments,
    steering: SteeringOptions,
    reference: str | None = None,
    compare: str | None = None,
    report_to: Sequence[str] = (),
) -> Mapping[str, Any]:
    """Respond, judge, write the files and print the rates. Return the contents of `metrics.json`.

    Helpfulness leaves harmful prompts out. `reference` is a model, a responses.jsonl or `set` that answers are compared
    with one by one; `compare` is `base` or a model that is evaluated, too. `report_to` names trackers.

    Raises:
        InputError: for a model, prompts, a judge or a reference that cannot be used.
        SystemExit: with code 1 if more than `--max_unscored` of the verdicts are unscored.
    """
    folder = output_folder(run, command, how.model)
    options = {"retry_failed": run.retry_unscored, "progress": run.progress}
    names = ("prompts", "responses and verdicts", *["compared model"] * (compare is not None))
    with opened(folder, run, f"sails eval {command}", names) as (stages, cache):
        say(f"{command} of {how.model}; output: {folder}/ (all lines: {LOG_FILE})")
        prompts = prompts_of(how, asked, stages, harmless_only=command == "helpfulness")
        judges = _judges(command, who, prompts, reference)
        spec = find_spec(how)
        responder = Responder(how, spec, hook_of(steering, spec))
        other = None if compare is None else compared_with(compare, responder)
        decides = all_but(NOT_IN_IDENTITY, how, asked, who, run, steering)
        identity = _identity(command, decides, [responder, other], prompts, judges, reference)
        check_earlier(folder, identity, METRICS_FILE, overwrite=run.overwrite_output_dir)
        answers = None if reference is None else reference_answers(reference, how, prompts, cache, **options)
        about = {"sets": asked.prompts, "n": len(prompts), "part": asked.part}
        _forget_comparison(folder)

        def result_of(
            name: str, who_responds: Responder, judges: Mapping[str, Judge], folder: Path
        ) -> EvaluationResult:
            provenance = {"command": identity["command"], "model_name": name}
            return evaluate(
                prompts,
                _backend(who_responds, prompts),
                judges,
                tasks=TASKS[command],
                sampling=how.sampling(prompts),
                reference=answers,
                cache=cache,
                folder=folder,
                provenance={**provenance, "prompts": about, "reference": identity["reference"]},
                **options,
            )

        stages.begin("responses and verdicts", f"{how.model} by {how.backend}, judged by {', '.join(judges)}")
        results = [result_of(how.model, responder, judges, folder)]
        write_record(folder, identity)
        if other is not None:
            stages.begin("compared model", str(compare))
            name = f"{how.model} ({BASE})" if compare == BASE else str(compare)
            results.append(result_of(name, other, make_judges(who, prompts), folder / COMPARED))
        _show(results, compare, _title(command, how.model, reference), folder)
        send(results, report_to, folder)
    for result in results:
        fail_if_unscored(result.metrics["unscored"], run.max_unscored)
    return results[0].metrics


@contextmanager
def opened(folder: Path, run: RunArguments, command: str, stages: Sequence[str]) -> Iterator[tuple[Stages, Cache]]:
    """Make the output folder and its log file, and open the cache."""
    with (
        work_folder(folder),
        log_file(folder, command),
        Stages(stages) as begun,
        closing(Cache(cache_file(run))) as cache,
    ):
        yield begun, cache


def _title(command: str, model: str, reference: str | None) -> str:
    return f"{command.capitalize()} of {model}" + (f" against {reference}" if reference else "")


def _identity(
    command: str,
    options: Mapping[str, Any],
    who: Sequence[Responder | None],
    prompts: Sequence[Prompt],
    judges: Mapping[str, Judge],
    reference: str | None,
) -> dict[str, Any]:
    """Return all that decides the results: options, and the content of what they name."""
    responder, other = who
    assert responder is not None
    return {
        "command": f"sails eval {command}",
        "options": options,
        "prompts": prompts_hash(prompts),
        "sampling": asdict(responder.how.sampling(prompts)),
        "model": _backend(responder, prompts).identity(),
        "judges": identities(judges),
        "reference": None if reference is None else reference_identity(reference, responder.how),
        "compared": None if other is None else _backend(other, prompts).identity(),
    }


def _backend(who: Responder, prompts: Sequence[Prompt]) -> Backend:
    return make_backend(who.how, who.spec, prompts, who.hook)


def prompts_of(how: ResponseArguments, asked: PromptArguments, stages: Stages, *, harmless_only: bool) -> list[Prompt]:
    """Load the prompts of an evaluation, and say how many they are."""
    stages.begin("prompts", ", ".join(asked.prompts))
    prompts = load_all(asked, how.seed, how.system_prompt)
    if harmless_only:
        prompts = [prompt for prompt in prompts if prompt.kind != "harmful"]
        if not prompts:
            raise InputError("all prompts are harmful; add benign prompts with --prompts")
    say(f"    {counted(prompts)}")
    return prompts


def _forget_comparison(folder: Path) -> None:
    """Remove the comparison of an earlier evaluation, and the log that inspect_ai's viewer would show with this one."""
    for path in (folder / COMPARISON_FILE, folder / COMPARED / INSPECT_FILE):
        path.unlink(missing_ok=True)


def _show(results: Sequence[EvaluationResult], compare: str | None, title: str, folder: Path) -> None:
    """Print the rates of a model, or those of two models with their differences, which are written, too."""
    if compare is None:
        show_rates(results[0].metrics, title, folder)
        return
    comparison = {COMPARED: compare, **comparison_of(*results)}
    write_json(folder / COMPARISON_FILE, comparison)
    show_comparison(comparison, f"{title}, compared with {compare}", [of.metrics for of in results], folder)


def _judges(
    command: Literal["safety", "helpfulness"], who: JudgeArguments, prompts: Sequence[Prompt], reference: str | None
) -> Mapping[str, Judge]:
    """Make the judges; refuse ones that cannot score helpfulness, or not compare with a reference, if that is asked."""
    judges = make_judges(who, prompts)
    tasks = {task for judge in judges.values() for task in judge.tasks}
    wanted = {*OPTIONAL} if reference is None else {*COMPARING}
    names = ", ".join(judges)
    if command == "safety" and "harm" not in tasks and any(prompt.kind == "harmful" for prompt in prompts):
        raise InputError(f"{names} cannot judge harm; use --judge llm, guard or rules, or oracle on the testbed")
    if command == "helpfulness" and not tasks & wanted:
        raise InputError(
            f"{names} cannot judge how helpful answers are; use --judge llm, oracle on the testbed, or rouge with a "
            "--reference"
        )
    return judges
