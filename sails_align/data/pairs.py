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
from sails_align.data.formats import FORMATS, PROMPT_COLUMNS, Format, assistant, find_format, parse_prompt
from sails_align.data.loading import cache_errors, load_rows
from sails_align.data.rows import EXTRAS, MESSAGES, Normalized, OnBadRows, Parser, columns_by_lower_name, read_rows


@dataclass(frozen=True)
class AlignmentExamples:
    """Normalized examples of one training."""

    safety: Dataset
    """Pairs of harmful requests: the response contrast, and the harmful side of the prompt contrast."""
    helpful: Dataset | None
    """Examples of harmless requests: the harmless side of the prompt contrast."""
    train: Dataset
    """What is trained on: the safety pairs, until transforms change it."""


def normalize(
    dataset: Dataset, *, name: str = "the data set", on_bad_rows: OnBadRows = "error", need_rejected: bool = False
) -> Normalized:
    """Convert a dataset of any format in `formats.FORMATS` to one common form.

    Args:
        dataset: rows as they were loaded.
        name: what messages call it.
        on_bad_rows: what to do about rows that cannot be used: end with an error that counts them by cause and names
            the first of each, or leave them out and report how many.
        need_rejected: whether a data set without rejected responses is an error.

    Raises:
        InputError: if the data set is empty, its columns are not understood, there are bad rows (or, with "skip", no
            good ones), or there are no rejected responses where they are needed.
    """
    columns = columns_by_lower_name(dataset)
    form = find_format(columns)
    if form is None:
        raise InputError(_not_understood(dataset, columns, name))
    if need_rejected and form.rejected is None:
        raise InputError(_no_pairs(dataset, name))
    extras = [column for column in ("category", "harmful") if column in columns]
    kept = ["prompt", "chosen", *(["rejected"] if form.rejected else []), *extras]
    return read_rows(dataset, [*form.columns, "input"], kept, _PairParser(form), name, on_bad_rows)


def load_prompts(
    name_or_path: str,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    on_bad_rows: OnBadRows = "error",
) -> Dataset:
    """Load only the prompts of a dataset: a prompt set (AdvBench, JailbreakBench, StrongREJECT), or any format.

    Returns:
        columns `prompt` (messages), and those of `category`, `harmful` and `target` (the start of a compliant answer,
        for attacks) that the source has.

    Raises:
        InputError: as `load_rows` and `normalize`.
    """
    dataset = load_rows(name_or_path, config=config, split=split, revision=revision)
    return _prompts_of(dataset, name_or_path, on_bad_rows)


def requests_of(
    given: Dataset | Sequence[Any], *, name: str = "the data set", on_bad_rows: OnBadRows = "error"
) -> Dataset:
    """Read requests that are in memory, with their responses where they have some.

    Args:
        given: texts, conversations (lists of messages), rows of any format, things with `messages`; or a data set.
        name: what messages call it.
        on_bad_rows: see `normalize`.

    Returns:
        columns `prompt` (messages), and `chosen` if there are responses.

    Raises:
        InputError: as `normalize`.
    """
    dataset = given if isinstance(given, Dataset) else Dataset.from_list([_row_of(one) for one in given])
    if find_format(columns_by_lower_name(dataset)) is not None:
        return normalize(dataset, name=name, on_bad_rows=on_bad_rows).dataset
    return _prompts_of(dataset, name, on_bad_rows)


def _row_of(one: Any) -> dict[str, Any]:
    if isinstance(one, Mapping):
        return dict(one)
    return {"prompt": [dict(message) for message in getattr(one, "messages", one)] if not isinstance(one, str) else one}


def _prompts_of(dataset: Dataset, name: str, on_bad_rows: OnBadRows) -> Dataset:
    columns = columns_by_lower_name(dataset)
    form = find_format(columns)
    prompt_column = next((column for column in PROMPT_COLUMNS if column in columns), None)
    if prompt_column is not None:
        parser: Parser = _PromptParser(prompt_column)
        read = [prompt_column, "input", "instances"]
    elif form is not None:
        parser, read = _PairParser(form), [*form.columns]
    else:
        raise InputError(_not_understood(dataset, columns, name))
    kept = ["prompt", *(column for column in EXTRAS if column in columns)]
    return read_rows(dataset, read, kept, parser, name, on_bad_rows).dataset


@dataclass(frozen=True)
class _PairParser:
    form: Format

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        example = self.form.parse(row)
        return {"prompt": example.prompt, "chosen": example.chosen, "rejected": example.rejected}


@dataclass(frozen=True)
class _PromptParser:
    column: str

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"prompt": parse_prompt(row, self.column)}


def _no_pairs(dataset: Dataset, name: str) -> str:
    return (
        f"{name} has no rejected responses (columns {', '.join(dataset.column_names)}), and pairs are needed;\n"
        "give one with the columns chosen, rejected, and perhaps prompt"
    )


def _not_understood(dataset: Dataset, columns: Mapping[str, str], name: str) -> str:
    found = f"{name} has the columns {', '.join(dataset.column_names)}"
    if any(column in columns for column in PROMPT_COLUMNS):
        return f"{found}: prompts without responses to learn from;\ngive it where prompts are asked for, or other data"
    understood = " | ".join(", ".join(form.columns) for form in FORMATS)
    prompts = " | ".join(PROMPT_COLUMNS)
    return f"{found}, which are not understood;\nrename them to one of: {understood};\nor, for prompts only: {prompts}"


def to_sft(dataset: Dataset) -> Dataset:
    """Convert normalized rows to TRL's conversational prompt-completion form. `SFTTrainer` trains on the completion
    only.
    """

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["prompt"], "completion": [assistant(row["chosen"])]}

    return _convert(dataset, convert, ("prompt", "completion"))


def to_preference(dataset: Dataset) -> Dataset:
    """Convert normalized rows to TRL's conversational preference form, with explicit prompts.

    Raises:
        InputError: if the rows have no rejected responses.
    """
    if "rejected" not in dataset.column_names:
        raise InputError(_no_pairs(dataset, "the data set"))

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "chosen": [assistant(row["chosen"])], "rejected": [assistant(row["rejected"])]}

    return _convert(dataset.select_columns(["prompt", "chosen", "rejected"]), convert, ("prompt", "chosen", "rejected"))


def _convert(dataset: Dataset, convert: Callable[[dict[str, Any]], dict[str, Any]], columns: Iterable[str]) -> Dataset:
    with cache_errors():
        return dataset.map(
            convert,
            remove_columns=dataset.column_names,
            features=Features({column: MESSAGES for column in columns}),
            desc="Converting rows",
        )


def fingerprint(dataset: Dataset) -> str:
    """Return the SHA-256 (hex) of the rows in order, independent of their cache location and the order of columns.

    The rows must be JSON-able, as those of normalised data sets are; they are read in batches.
    """
    digest = hashlib.sha256()
    for batch in dataset.iter(batch_size=1000):
        columns = sorted(batch)
        for values in zip(*(batch[column] for column in columns), strict=True):
            row = json.dumps(dict(zip(columns, values, strict=True)), sort_keys=True)
            digest.update(f"{row}\n".encode())
    return digest.hexdigest()
