"""Convert datasets to preference pairs, SFT examples and prompts, each a `datasets.Dataset` on disk.

rows = load_rows("data/pairs.jsonl.gz")            # a hub id, a folder, or a json, jsonl, csv or parquet file
pairs = normalize(rows).dataset                    # prompt, chosen, rejected; perhaps category and harmful
train = to_sft(pairs)                              # TRL's form; to_preference(pairs) for DPO
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features

from sails_align.core.errors import InputError
from sails_align.data.formats import FORMATS, PROMPT_COLUMNS, assistant, find_format, parse_prompt
from sails_align.data.loading import cache_errors
from sails_align.data.rows import EXTRAS, MESSAGES, Normalized, OnBadRows, columns_by_lower_name, read_rows


@dataclass(frozen=True)
class AlignmentExamples:
    """Normalized examples of one training."""

    safety: Dataset
    """Pairs of harmful requests: the response contrast, and the harmful side of the prompt contrast."""
    helpful: Dataset | None
    """Examples of harmless requests: the harmless side of the prompt contrast."""
    train: Dataset
    """What is trained on: the safety pairs, until transforms change it."""


def normalize(dataset: Dataset, *, name: str = "the data set", on_bad_rows: OnBadRows = "error") -> Normalized:
    """Convert a dataset of any format in `formats.FORMATS` to one common form; `name` is for messages.

    With "error", unusable rows are an error that counts them by cause; with "skip", they are left out and counted.
    Raises `InputError` if the dataset is empty, its columns are not understood, or no good rows are left.
    """
    columns = columns_by_lower_name(dataset)
    form = find_format(columns)
    if form is None:
        raise InputError(_not_understood(dataset, columns, name))
    kept = ["prompt", "chosen", *(["rejected"] if form.rejected else []), *_extras_in(columns)]
    return read_rows(dataset, [*form.columns, "input"], kept, form.parse, name, on_bad_rows)


def requests_of(
    given: Dataset | Sequence[Any], *, name: str = "the data set", on_bad_rows: OnBadRows = "error"
) -> Dataset:
    """Read requests that are in memory, with their responses where they have some.

    They are texts, conversations (lists of messages), rows of any format, things with `messages`; or a dataset. The
    result has columns `prompt` (messages), and `chosen` if there are responses. See `normalize` for the rest.
    """
    dataset = given if isinstance(given, Dataset) else Dataset.from_list([_row_of(one) for one in given])
    columns = columns_by_lower_name(dataset)
    if find_format(columns) is not None:
        return normalize(dataset, name=name, on_bad_rows=on_bad_rows).dataset
    column = next((column for column in PROMPT_COLUMNS if column in columns), None)
    if column is None:
        raise InputError(_not_understood(dataset, columns, name))

    def parse(row: Mapping[str, Any]) -> dict[str, Any]:
        return {"prompt": parse_prompt(row, column)}

    kept = ["prompt", *_extras_in(columns)]
    return read_rows(dataset, [column, "input", "instances"], kept, parse, name, on_bad_rows).dataset


def _row_of(one: Any) -> dict[str, Any]:
    if isinstance(one, Mapping):
        return dict(one)
    return {"prompt": [dict(message) for message in getattr(one, "messages", one)] if not isinstance(one, str) else one}


def _extras_in(columns: Mapping[str, str]) -> list[str]:
    return [column for column in EXTRAS if column in columns]


def _not_understood(dataset: Dataset, columns: Mapping[str, str], name: str) -> str:
    found = f"{name} has the columns {', '.join(dataset.column_names)}"
    if any(column in columns for column in PROMPT_COLUMNS):
        return f"{found}: prompts without responses to learn from;\ngive it where prompts are asked for, or other data"
    understood = " | ".join(", ".join(form.columns) for form in FORMATS)
    prompts = " | ".join(PROMPT_COLUMNS)
    return f"{found}, which are not understood;\nrename them to one of: {understood};\nor, for prompts only: {prompts}"


def to_sft(dataset: Dataset) -> Dataset:
    """Convert normalized rows to TRL's conversational prompt-completion form; only the completion is trained on."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["prompt"], "completion": [assistant(row["chosen"])]}

    return _convert(dataset, convert, ("prompt", "completion"))


def to_preference(dataset: Dataset) -> Dataset:
    """Convert normalized rows to TRL's conversational preference form, with explicit prompts."""
    if "rejected" not in dataset.column_names:
        raise InputError(
            f"the data has no rejected responses (columns {', '.join(dataset.column_names)}), and pairs are needed;\n"
            "give a dataset with the columns chosen, rejected, and perhaps prompt"
        )

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"chosen": [assistant(row["chosen"])], "rejected": [assistant(row["rejected"])]}

    return _convert(dataset, convert, ("prompt", "chosen", "rejected"))


def _convert(dataset: Dataset, convert: Callable[[dict[str, Any]], dict[str, Any]], columns: Iterable[str]) -> Dataset:
    features = Features({column: MESSAGES for column in columns})
    others = [column for column in dataset.column_names if column not in features]
    with cache_errors():
        return dataset.map(convert, remove_columns=others, features=features, desc="Converting rows")


def fingerprint(dataset: Dataset) -> str:
    """Return the SHA-256 (hex) of JSON-able rows in order, independent of the order of columns."""
    digest = hashlib.sha256()
    for batch in dataset.iter(batch_size=1000):
        columns = sorted(batch)
        for values in zip(*(batch[column] for column in columns), strict=True):
            row = json.dumps(dict(zip(columns, values, strict=True)), sort_keys=True)
            digest.update(f"{row}\n".encode())
    return digest.hexdigest()
