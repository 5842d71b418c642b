"""Write an evaluation as a log of inspect_ai, for its viewer: `inspect view --log-dir <output_dir>`.

<output_dir>/inspect.eval   prompts, responses, scores with explanations, and metrics, if inspect_ai is installed

No model runs again. Samples are numbered as the lines of responses.jsonl are. A score is called by its task; where
several judges voted, each one's stands beside the vote's, as `TASK by JUDGE`. What is unscored has the score NaN and
the reason, as in inspect_ai's own logs.
"""

import importlib.util
import math
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.core.artifacts import content_hash
from sails_align.core.files import disk_errors, write_bytes
from sails_align.evaluation.metrics import METRICS, Estimate
from sails_align.evaluation.output import prompt_row
from sails_align.evaluation.records import VOTE, Completion, Message, Prompt, Task, Verdict

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample, EvalScore
    from inspect_ai.model import ChatMessage, ModelOutput
    from inspect_ai.scorer import Score

    from sails_align.evaluation.result import EvaluationResult

INSPECT_FILE = "inspect.eval"
"""In the output folder; inspect_ai finds files of this ending, also in folders below."""
INSTALL = "pip install 'sails-align[inspect]'"
LAYOUT = 1
"""To be raised when logs of the same result change."""
STOP_REASONS = {"stop": "stop", "length": "max_tokens", "content_filter": "content_filter"}
IN_METADATA = ("split", "attack")
"""What of a prompt's meta samples can be filtered by, besides its kind and category."""


def can_write_log() -> bool:
    """Return whether inspect_ai is installed."""
    return importlib.util.find_spec("inspect_ai") is not None


def write_log(result: "EvaluationResult", folder: Path) -> None:
    """Write the log of a result, as a whole or not at all, unless it is there.

    Without inspect_ai, the log of an earlier result is removed.
    """
    path = folder / INSPECT_FILE
    if not can_write_log():
        path.unlink(missing_ok=True)
        return
    from inspect_ai.log import write_eval_log

    if _key_of(path) == _key(result):  # inspect_ai 0.3.285 takes 18 s of a core for 5,000 samples
        return

    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / INSPECT_FILE
        with disk_errors(made):
            write_eval_log(log_of(result), str(made))
        write_bytes(path, made.read_bytes())


def _key(result: "EvaluationResult") -> str:
    """Return a hash of all that the log holds; of the length of inspect_ai's own ids."""
    verdicts = {
        task: {name: [(place, asdict(verdict)) for place, verdict in of.items()] for name, of in by_judge.items()}
        for task, by_judge in result.verdicts.items()
    }
    rows = [prompt_row(prompt) for prompt in result.prompts]
    answers = [asdict(response) for response in (*result.responses, *(result.reference or ()))]
    return content_hash([LAYOUT, rows, answers, verdicts, result.metrics])[:22]


def _key_of(path: Path) -> str | None:
    """Return the hash that a log was written with; None if there is none, or it is damaged."""
    from inspect_ai.log import read_eval_log

    if not path.is_file():
        return None
    try:
        return read_eval_log(str(path), header_only=True).eval.eval_id
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
        return None


def log_of(result: "EvaluationResult") -> "EvalLog":
    """Return the log of a result. Two of the same result differ in their times alone."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalSpec, EvalStats
    from inspect_ai.model import GenerateConfig

    about = result.metrics["provenance"]
    sampling, sets = about.get("sampling") or {}, about.get("prompts", {}).get("sets", ())
    model, n = str(about.get("model_name") or "unknown"), len(result.prompts)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    key = _key(result)
    return EvalLog(
        status="success",
        eval=EvalSpec(
            eval_id=key,
            run_id=key,
            task_id=key,
            created=created,
            task=str(about.get("command") or "evaluation"),
            model=model,
            dataset=EvalDataset(name=" ".join(sets), samples=n, sample_ids=list(range(1, n + 1))),
            config=EvalConfig(),
            model_generate_config=GenerateConfig(
                max_tokens=sampling.get("max_new_tokens"),
                temperature=sampling.get("temperature"),
                seed=sampling.get("seed"),
            ),
            packages={name: version for name, version in about.get("versions", {}).items() if version},
            metadata={name: value for name, value in result.about.items() if name != "provenance"},
        ),
        results=EvalResults(total_samples=n, completed_samples=n, scores=list(_scores(result))),
        stats=EvalStats(started_at=created, completed_at=created),
        samples=[_sample(result, place, model) for place in range(n)],
    )


def chat_message(message: Message, name: str | None = None) -> "ChatMessage":
    """Return a message as inspect_ai has it; `name` is its id."""
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    return kinds[message["role"]](content=message["content"], id=name)


def _scorers(result: "EvaluationResult") -> Iterator[tuple[str, Task, str, Mapping[int, Verdict]]]:
    """Yield the name, task, judge and verdicts of each scorer: the vote, and each judge if there are several."""
    for task, by_judge in result.verdicts.items():
        judges = [name for name in by_judge if name != VOTE]
        yield task, task, judges[0] if len(judges) == 1 else VOTE, by_judge[VOTE]
        for judge in judges if len(judges) > 1 else ():
            yield f"{task} by {judge}", task, judge, by_judge[judge]


def _sample(result: "EvaluationResult", place: int, model: str) -> "EvalSample":
    from inspect_ai.log import EvalError, EvalSample

    prompt, response, line = result.prompts[place], result.responses[place], place + 1
    asked = [chat_message(message, f"{line}-{number}") for number, message in enumerate(prompt.conversation, 1)]
    output = _output(response, model, f"{line}-response")
    cause = response.error or response.finish_reason or "no response"
    reference = None if result.reference is None else result.reference[place].text
    return EvalSample(
        id=line,
        epoch=1,
        input=asked,
        target=reference or "",
        messages=[*asked, *(choice.message for choice in output.choices)],
        output=output,
        scores={
            name: _score(verdicts[place], judge) for name, _, judge, verdicts in _scorers(result) if place in verdicts
        },
        metadata=_metadata(prompt, response),
        uuid=content_hash([line, prompt.id, list(prompt.conversation), response.text])[:22],
        error=EvalError(message=cause, traceback=cause, traceback_ansi=cause) if response.failed else None,
    )


def _metadata(prompt: Prompt, response: Completion) -> dict[str, Any]:
    about = {name: getattr(prompt, name) for name in ("id", "kind", "category")}
    return (
        about
        | {name: prompt.meta[name] for name in IN_METADATA if name in prompt.meta}
        | {"finish_reason": response.finish_reason}
    )


def _output(response: Completion, model: str, name: str) -> "ModelOutput":
    from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput

    if response.text is None:
        return ModelOutput(model=model, error=response.error)
    stop: Any = STOP_REASONS.get(response.finish_reason or "", "unknown")
    message = ChatMessageAssistant(content=response.text, id=name, model=model, source="generate")
    return ModelOutput(model=model, choices=[ChatCompletionChoice(message=message, stop_reason=stop)])


def _score(verdict: Verdict, judge: str) -> "Score":
    from inspect_ai.scorer import Score

    value = math.nan if verdict.score is None else verdict.score
    return Score(value=value, reason=verdict.reason, explanation=verdict.explanation, metadata={"judge": judge})


def _scores(result: "EvaluationResult") -> Iterator["EvalScore"]:
    """Yield the metrics of each scorer."""
    from inspect_ai.log import EvalMetric, EvalScore

    for name, task, judge, verdicts in _scorers(result):
        rates = result.rates(judge=VOTE if name == task else judge)
        n_unscored = sum(verdict.failed for verdict in verdicts.values())
        metrics = {
            metric: EvalMetric(name=metric, value=math.nan if value is None else value, metadata=about)
            for rate, estimate in rates.items()
            if METRICS[rate].task == task
            for metric, value, about in _with_interval(rate, estimate)
        }
        yield EvalScore(
            name=name,
            scorer=name,
            scored_samples=len(verdicts) - n_unscored,
            unscored_samples=n_unscored,
            params={"judge": judge},
            metrics=metrics,
        )


def _with_interval(name: str, estimate: Estimate) -> Iterator[tuple[str, float | None, dict[str, Any] | None]]:
    """Yield a metric and its interval, by the names that they have in our tasks of inspect_ai."""
    counts = {"n": estimate.n, "n_unscored": estimate.n_unscored}
    yield name, estimate.value, {"label": METRICS[name].heading, "definition": METRICS[name].definition, **counts}
    yield f"{name}_ci_low", estimate.ci_low, None
    yield f"{name}_ci_high", estimate.ci_high, None
