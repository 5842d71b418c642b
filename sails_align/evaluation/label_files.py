"""Read responses with known labels: of harm, from 1 (complete refusal) to 5 (full harmful compliance), or of refusal.

Published labels are read as they are: XSTest's completions and AllenAI's XSTest responses, Do-Not-Answer,
WildGuardTest, Aegis, BeaverTails, and JailbreakBench's comparison of judges.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from sails_align.core.errors import InputError
from sails_align.data.loading import load_rows, without_unreadable
from sails_align.data.rows import OnBadRows, columns_by_lower_name
from sails_align.evaluation.prompts.definitions import Row
from sails_align.evaluation.records import Item, Prompt, Task

logger = logging.getLogger(__name__)

LEVELS = (1.0, 2.0, 3.0, 4.0, 5.0)
HARM: Mapping[str, float] = {
    "safe": 1, "refused": 1, "unharmful": 1, "harmless": 1, "unsafe": 5, "harmful": 5,
    **{f"{level:g}": level for level in LEVELS},
}  # fmt: skip
REFUSAL: Mapping[str, float] = {
    "1_full_compliance": 0, "2_full_refusal": 1, "3_partial_refusal": 1,  # XSTest
    "compliance": 0, "refusal": 1,
}  # fmt: skip
MEANINGS: Mapping[str, Mapping[str, float]] = {
    "is_safe": {"true": 1, "false": 5, "1": 1, "0": 5},
    "human_majority": {"0": 1, "1": 5, "false": 1, "true": 5},
    "harmful": {"0": 1, "1": 5, "false": 1, "true": 5},  # Do-Not-Answer's GPT4_harmful, ...
}
"""Of the values of columns that have their own."""
PROMPT, RESPONSE = ("prompt", "question", "goal"), ("response", "completion", "target_response")
LABEL = (
    *("label", "final_label", "response_harm_label", "response_label", "is_safe", "human_majority"),
    "response_refusal_label",
)
"""Known columns, in lower case; the first one of a file counts."""


@dataclass(frozen=True)
class Labelled:
    """Responses, and the right label of each."""

    items: list[Item]
    labels: list[float]
    task: Task = "harm"
    """What the labels say: how harmful (1 to 5), or refused (0 or 1)."""


def read_labels(path: str, label_column: str | None = None, on_bad_rows: OnBadRows = "error") -> Labelled:
    """Read responses and labels from a file. Rows without a label are left out, with a warning.

    Args:
        path: of a file with a prompt, a response and a label in a row, or of Do-Not-Answer's responses of several
            models in a row.
        label_column: the column of the labels, if it is not a known one (`LABEL`).
        on_bad_rows: what to do with rows that cannot be read: "error", or "skip" (left out and counted).

    Raises:
        InputError: if a column is missing, a label is of unknown meaning, or some are of harm and some of refusal.
    """
    rows = without_unreadable(load_rows(path, mark_unreadable=on_bad_rows == "skip"), path)
    names = columns_by_lower_name(rows)
    models = _models(names, label_column)
    found = _of_models(rows, names, models) if models else _one_a_row(rows, names, path, label_column)
    items: list[Item] = []
    labels: Counter[Task] = Counter()
    scores: list[float] = []
    n_empty = 0
    for index, (item, label, column) in enumerate(found):
        if _is_empty(label):
            n_empty += 1
            continue
        task, score = _meaning(label, column, index)
        labels[task] += 1
        items.append(item)
        scores.append(score)
    if len(labels) > 1:
        raise InputError(f"{path} has labels of harm and of refusal; give files of one kind, or see --label_column")
    if not items:
        raise InputError(f"{path} has no labels; give responses with labels, or see --label_column")
    if n_empty:
        logger.warning("%s: %d responses have no label and are left out", path, n_empty)
    return Labelled(items, scores, next(iter(labels)))


def _one_a_row(
    rows: Dataset, names: Mapping[str, str], path: str, label_column: str | None
) -> Iterator[tuple[Item, Any, str]]:
    """Yield responses with their labels and the column of the label."""
    known = {"prompt": PROMPT, "response": RESPONSE, "label": (label_column.lower(),) if label_column else LABEL}
    columns = {role: next((name for name in options if name in names), None) for role, options in known.items()}
    for role, options in known.items():
        if columns[role] is None:
            raise InputError(
                f"{path} has no column {options[0]!r} (it has {', '.join(rows.column_names)});\n"
                "rename a column, or see --label_column"
            )
    prompt, response, label = (names[str(column)] for column in columns.values())
    category = names.get("category") or names.get("type") or ""
    for index, row in enumerate(rows):
        assert isinstance(row, dict)
        of_row = row.get(category)  # BeaverTails has flags there
        item = _item(index, row, prompt, response, of_row if of_row and isinstance(of_row, str) else "all")
        yield item, row[label], label.lower()


def _models(names: Mapping[str, str], label_column: str | None) -> list[str]:
    """Return the models whose responses and labels are in columns of their own (GPT4_response, GPT4_harmful)."""
    asked = [name for name in names if name == label_column.lower()] if label_column else list(names)
    models = [name.removesuffix("_harmful") for name in asked if name.endswith("_harmful")]
    return [model for model in models if f"{model}_response" in names]


def _of_models(rows: Dataset, names: Mapping[str, str], models: list[str]) -> Iterator[tuple[Item, Any, str]]:
    """Yield the responses of Do-Not-Answer, which has those of several models in a row."""
    question = names.get("question") or names.get("prompt")
    if question is None:
        raise InputError(
            f"responses of {', '.join(models)} have no column 'question'; rename the column of the prompts"
        )
    for index, row in enumerate(rows):
        assert isinstance(row, dict)
        for model in models:
            item = _item(f"{index} {model}", row, question, names[f"{model}_response"], model)
            yield item, row[names[f"{model}_harmful"]], "harmful"


def _item(name: object, row: Row, prompt: str, response: str, category: str) -> Item:
    message = {"role": "user", "content": str(row[prompt])}
    return Item(Prompt(str(name), (message,), "harmful", category), str(row[response] or ""))


def _is_empty(label: Any) -> bool:
    return label is None or label != label or not str(label).strip()


def _meaning(value: Any, column: str, index: int) -> tuple[Task, float]:
    word = re.sub(r"\.0$", "", str(value).strip().lower())
    meanings = MEANINGS.get(column, HARM)
    if word in meanings:
        return "harm", float(meanings[word])
    if word in REFUSAL and meanings is HARM:
        return "refusal", float(REFUSAL[word])
    raise InputError(
        f"row {index}: the label is {word if word.isdigit() else repr(value)}; give 1, 2, 3, 4 or 5, or "
        f"{', '.join(name for name in {**meanings, **(REFUSAL if meanings is HARM else {})} if not name.isdigit())}"
    )
