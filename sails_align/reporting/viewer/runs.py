"""Read what a folder has of responses and verdicts: of an evaluation, an attack, or a training on the testbed."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sails_align.core.errors import InputError
from sails_align.core.suggestions import did_you_mean_path
from sails_align.evaluation.metrics import METRICS, Estimate
from sails_align.evaluation.output import (
    COMPARED,
    COMPARISON_FILE,
    METRICS_FILE,
    RESPONSES_FILE,
    VERDICTS_FILE,
    read_rows,
)
from sails_align.evaluation.records import VOTE, Completion, Kind, Prompt, Task, Verdict, Verdicts

ORACLE = "oracle"
"""Who judged the responses of a training's `responses.jsonl`."""
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class ViewedRun:
    """The responses of a model, with what was made of them."""

    name: str
    prompts: Sequence[Prompt]
    responses: Sequence[Completion]
    verdicts: Verdicts
    """Empty if nothing is judged yet."""
    rates: Mapping[str, Estimate]
    """By name of the metric."""


def read_runs(folder: Path, other: Path | None = None) -> list[ViewedRun]:
    """Return the models to show: one, or two, of which the first is the one to compare with.

    Args:
        folder: of an evaluation or a training; one with `--compare` has two models, as has a training on the testbed.
        other: another one. With it, each folder has one model: of a training, the trained one.

    Raises:
        InputError: if there are no responses, or a file is damaged.
    """
    if other is None:
        return _of_folder(folder)
    first, second = (_of_folder(each)[-1] for each in (folder, other))
    if first.name == second.name:
        return [_named(first, str(folder)), _named(second, str(other))]
    return [first, second]


def run_with_features(folder: Path) -> Path | None:
    """Return the SAILS run that responses are of: the folder, or its evaluation's model; None if neither is one."""
    try:
        provenance = _record(folder / METRICS_FILE).get("provenance")
        model = provenance.get("model_name") if isinstance(provenance, dict) else None
        return next((run for run in (folder, Path(str(model))) if _has_features(run)), None)
    except InputError:  # the file is missing or damaged
        return None


def _has_features(run: Path) -> bool:
    """Return whether adapters were initialized in a subspace of SAE features."""
    path = run / "subspace" / "subspace.json"
    return path.is_file() and "features" in (_record(path).get("provenance") or {})


def _named(run: ViewedRun, name: str) -> ViewedRun:
    return ViewedRun(name, run.prompts, run.responses, run.verdicts, run.rates)


def _of_folder(folder: Path) -> list[ViewedRun]:
    """Return the models of a folder, that of the evaluation or the trained one last."""
    rows = _rows(folder, RESPONSES_FILE)
    if "messages" not in rows[0]:
        return _of_training(folder, rows)
    run = _of_evaluation(folder, rows)
    if not (folder / COMPARISON_FILE).is_file():
        return [run]
    other = folder / COMPARED
    name = str(_record(folder / COMPARISON_FILE).get(COMPARED, COMPARED))
    return [_named(_of_evaluation(other, _rows(other, RESPONSES_FILE)), name), run]


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / name
    try:
        rows = read_rows(path)
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise InputError(
                f"there is no folder {folder}{did_you_mean_path(str(folder)) or ';'}\n"
                "give the output folder of an evaluation (sails eval safety)"
            ) from error
        raise InputError(
            f"{folder} has no {name}, so there are no responses to show;\n"
            "give the output folder of sails eval safety or helpfulness, of an attack with a judge, or of a training "
            "on the testbed"
        ) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not rows:
        raise InputError(f"{path} is empty; run the command that made it again")
    return rows


def _damaged(path: Path, cause: object) -> InputError:
    return InputError(f"cannot read {path}: {cause};\nrestore it, or run the command that made it again")


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(record, dict):
        raise _damaged(path, "it is no JSON object")
    return record


def _of_evaluation(folder: Path, rows: Sequence[Mapping[str, Any]]) -> ViewedRun:
    path = folder / RESPONSES_FILE
    prompts, responses = [], []
    for number, row in enumerate(rows, 1):
        try:
            prompts.append(_prompt(row))
            responses.append(_completion(row))
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"row {number} is none of responses ({type(error).__name__}: {error})") from error
    if not (folder / VERDICTS_FILE).is_file():
        return ViewedRun(folder.name, prompts, responses, {}, {})
    verdicts = _verdicts(folder / VERDICTS_FILE, _rows(folder, VERDICTS_FILE), prompts)
    metrics = _record(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else {}
    provenance = metrics.get("provenance")
    name = provenance.get("model_name") if isinstance(provenance, dict) else None
    attacks = metrics.get("attacks")
    overall = metrics.get("overall") or (attacks.get("all") if isinstance(attacks, dict) else None)
    return ViewedRun(str(name or folder.name), prompts, responses, verdicts, _rates(folder, overall))


def _prompt(row: Mapping[str, Any]) -> Prompt:
    messages = [{"role": _text(message["role"]), "content": _text(message["content"])} for message in row["messages"]]
    if row["kind"] not in KINDS or not messages:
        raise ValueError(f"kind is {row['kind']!r}, with {len(messages)} messages")
    meta = row.get("meta") or {}
    if not isinstance(meta, dict) or not isinstance(meta.get("prefill") or "", str):
        raise TypeError("meta is no object, or its prefill no text")
    return Prompt(str(row["id"]), tuple(messages), row["kind"], _text(row["category"]), meta)


def _completion(row: Mapping[str, Any]) -> Completion:
    values = (row["response"], row.get("finish_reason"), row.get("error"))
    return Completion(*(None if value is None else _text(value) for value in values))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    return value


def _verdicts(path: Path, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> Verdicts:
    """Give each verdict its prompt: those of a task and a judge are in the order of the prompts that it is asked of."""
    found: dict[Any, dict[str, list[tuple[str, Verdict]]]] = {}
    for number, row in enumerate(rows, 1):
        try:
            if row["task"] not in get_args(Task):
                raise ValueError(f"there is no task {row['task']!r}")
            verdict = str(row["id"]), _verdict(row)
            found.setdefault(row["task"], {}).setdefault(_text(row["judge"]), []).append(verdict)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"row {number} is no verdict ({type(error).__name__}: {error})") from error
    verdicts: dict[Task, dict[str, dict[int, Verdict]]] = {}
    for task, by_judge in found.items():
        places = [place for place, prompt in enumerate(prompts) if (prompt.kind == "harmful") == (task == "harm")]
        ids = [prompts[place].id for place in places]
        for judge, of_judge in by_judge.items():
            if [name for name, _ in of_judge] != ids:
                raise _damaged(
                    path,
                    f"the {len(of_judge)} verdicts on {task} by {judge} are not of the prompts in {RESPONSES_FILE}",
                )
            of = dict(zip(places, (verdict for _, verdict in of_judge), strict=True))
            verdicts.setdefault(task, {})[judge] = of
        if VOTE not in by_judge:
            raise _damaged(path, f"there is no vote on {task}")
    return verdicts


def _verdict(row: Mapping[str, Any]) -> Verdict:
    score, explanation = row["score"], row.get("explanation")
    if score is not None and (not isinstance(score, int | float) or not math.isfinite(score)):
        raise ValueError(f"the score is {score!r}")
    reason: Any = None if row["reason"] is None else _text(row["reason"])
    return Verdict(None if score is None else float(score), reason, None if explanation is None else _text(explanation))


def _rates(folder: Path, values: Any) -> dict[str, Estimate]:
    if values is None:
        return {}
    try:
        return {name: Estimate(**values[name]) for name in METRICS if isinstance(values.get(name), dict)}
    except (TypeError, AttributeError) as error:
        raise _damaged(folder / METRICS_FILE, f"its rates cannot be read ({error})") from error


def _of_training(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[ViewedRun]:
    """Return the models that a training measured: before, unless it was resumed elsewhere, and after."""
    path, metrics = folder / RESPONSES_FILE, _record(folder / METRICS_FILE)
    runs = []
    for name in dict.fromkeys(str(row.get("model")) for row in rows):
        of_model = [row for row in rows if str(row.get("model")) == name]
        try:
            prompts = [_request(row, number) for number, row in enumerate(of_model)]
            responses = [Completion(_text(row["response"])) for row in of_model]
            verdicts = _of_oracle(of_model, prompts)
        except (KeyError, TypeError, ValueError) as error:
            cause = f"it has rows neither of an evaluation nor of a training ({type(error).__name__}: {error})"
            raise _damaged(path, cause) from error
        runs.append(ViewedRun(name, prompts, responses, verdicts, _rates(folder, metrics.get(name))))
    if len(runs) > 2:
        raise _damaged(path, f"it has responses of {len(runs)} models ({', '.join(run.name for run in runs)[:200]})")
    return runs


def _request(row: Mapping[str, Any], number: int) -> Prompt:
    kind: Kind = "harmful" if row["harmful"] else "dual_use" if row["split"] == "dual_use" else "benign"
    messages = ({"role": "user", "content": _text(row["prompt"])},)
    return Prompt(f"{row['split']}-{number}", messages, kind, _text(row["category"]), {"split": row["split"]})


def _of_oracle(rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> Verdicts:
    harmful = [place for place, prompt in enumerate(prompts) if prompt.kind == "harmful"]
    others = [place for place, prompt in enumerate(prompts) if prompt.kind != "harmful"]

    def both(places: Iterable[int], name: str) -> dict[str, dict[int, Verdict]]:
        of = {}
        for place in places:
            reason = rows[place].get("reason")
            of[place] = _verdict({"score": None if reason else rows[place][name], "reason": reason})
        return {ORACLE: of, VOTE: of}

    asked = {"harm": both(harmful, "score"), "refusal": both(others, "refused"), "correctness": both(others, "correct")}
    return {task: by_judge for task, by_judge in asked.items() if by_judge[VOTE]}  # pyright: ignore[reportReturnType]
