"""Name and write the files of an evaluation."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import content_hash
from sails_align.core.files import cache_folder, refuse_trained, write_text
from sails_align.evaluation.options import RunArguments
from sails_align.evaluation.records import Completion, Message, Prompt, Task, Verdict
from sails_align.models.spec import stem_of

RESPONSES_FILE, VERDICTS_FILE = "responses.jsonl", "verdicts.jsonl"
METRICS_FILE = "metrics.json"
"""In the output folder, written last."""
COMPARED, COMPARISON_FILE = "compared", "comparison.json"
"""With `--compare`, the folder of the other model's files, and the differences."""


def cache_file(run: RunArguments) -> Path:
    """Return the file of earlier responses and verdicts."""
    return Path(run.cache_path) if run.cache_path else default_cache()


def default_cache() -> Path:
    """Return the file of earlier responses and verdicts if none is named."""
    return cache_folder() / "evaluation.sqlite"


def output_folder(run: RunArguments, what: str, model: str) -> Path:
    """Return the folder that results go into; raise `InputError` if it holds a model or a training."""
    return refuse_trained(Path(run.output_dir or default_folder(what, model)))


def default_folder(what: str, model: str) -> str:
    """Name the default output folder after the model."""
    return f"runs/eval-{what}-{stem_with_run(model)}"


def stem_with_run(model: str) -> str:
    """Return what files of a model are called; of a checkpoint, with the name of its run."""
    names = [name for name in model.split("/") if name]
    return "-".join(map(stem_of, names[-2:] if names[-1].startswith("checkpoint-") else names[-1:]))


def conversation_hash(messages: Iterable[Message]) -> str:
    """Hash roles and contents, to find the same prompt in another result: ids are unique within a set only."""
    return content_hash([[message["role"], message["content"]] for message in messages])


def prompts_hash(prompts: Iterable[Prompt]) -> str:
    """Return the content hash of prompts, in their order."""
    return content_hash([prompt_row(prompt) for prompt in prompts])


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """Return a row of `attacked.jsonl`."""
    return {**asdict(prompt), "messages": list(prompt.messages)}


def _response_row(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    return {
        **{name: getattr(prompt, name) for name in ("id", "kind", "category")},
        "messages": list(prompt.messages),
        "response": completion.text,
        "finish_reason": completion.finish_reason,
        "error": completion.error,
        "meta": dict(prompt.meta),
    }


def verdict_row(prompt: Prompt, name: str, task: Task, verdict: Verdict) -> dict[str, Any]:
    """Return a row of `verdicts.jsonl`."""
    about = {"id": prompt.id, "kind": prompt.kind, "category": prompt.category, "task": task, "judge": name}
    return about | asdict(verdict)


def write_responses(path: Path, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
    """Write `responses.jsonl`."""
    write_text(path, response_lines(prompts, completions))


def response_lines(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> str:
    """Return the contents of `responses.jsonl`."""
    return _lines([_response_row(*pair) for pair in zip(prompts, completions, strict=True)])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, as a whole or not at all."""
    write_text(path, _lines(rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines.

    Raises:
        OSError: if it cannot be read.
        ValueError: if a line is no JSON object; the text says which one.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):  # texts may have U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        rows.append(row)
    return rows


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
