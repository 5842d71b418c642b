"""Data sets -> preference pairs, SFT examples and prompts, each a `datasets.Dataset` on disk rather than in memory.

rows = load_rows("data/pairs.jsonl.gz")            # a hub id, a folder, or a json, jsonl, csv or parquet file
pairs = normalize(rows).dataset                    # prompt, chosen, rejected; perhaps category and harmful
train = to_sft(mix(pairs, helpful, ratio=1.0, seed=0))
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, concatenate_datasets

from sails_align.core.errors import InputError
from sails_align.data.formats import FORMATS, PROMPT_COLUMNS, Format, assistant, find_format, parse_prompt
from sails_align.data.loading import cache_errors, load_rows
from sails_align.data.rows import EXTRAS, MESSAGES, Normalized, OnBadRows, Parser, columns_by_lower_name, read_rows


def normalize(
    dataset: Dataset, *, name: str = "the data set", on_bad_rows: OnBadRows = "error", need_rejected: bool = False
) -> Normalized:
    """Bring a data set of any format in `formats.FORMATS` into one form.

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
    """Load only the prompts of a data set: a set of prompts (AdvBench, JailbreakBench, StrongREJECT), or any format.

    Returns:
        columns `prompt` (messages), and those of `category`, `harmful` and `target` (the start of a compliant answer,
        for attacks) that the source has.

    Raises:
        InputError: as `load_rows` and `normalize`.
    """
    dataset = load_rows(name_or_path, config=config, split=split, revision=revision)
    columns = columns_by_lower_name(dataset)
    form = find_format(columns)
    prompt_column = next((column for column in PROMPT_COLUMNS if column in columns), None)
    if prompt_column is not None:
        parser: Parser = _PromptParser(prompt_column)
        read = [prompt_column, "input", "instances"]
    elif form is not None:
        parser, read = _PairParser(form), [*form.columns]
    else:
        raise InputError(_not_understood(dataset, columns, name_or_path))
    kept = ["prompt", *(column for column in EXTRAS if column in columns)]
    return read_rows(dataset, read, kept, parser, name_or_path, on_bad_rows).dataset


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
    """Normalised rows -> TRL's conversational prompt-completion form, on whose completion alone `SFTTrainer` trains."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["prompt"], "completion": [assistant(row["chosen"])]}

    return _convert(dataset, convert, ("prompt", "completion"))


def to_preference(dataset: Dataset) -> Dataset:
    """Normalised rows -> TRL's conversational preference form, with explicit prompts.

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


def contaminate(pairs: Dataset, share: float, seed: int) -> Dataset:
    """Pairs, of a share of which (rounded to whole pairs) the chosen and the rejected response have changed places.

    Raises:
        InputError: if there are no rejected responses.
    """
    if "rejected" not in pairs.column_names:
        raise InputError(f"contamination is {share}, but the safety data has no rejected responses; leave it out")
    wrong = set(np.random.default_rng(seed).permutation(len(pairs))[: round(share * len(pairs))].tolist())

    def swap(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"chosen": row["rejected"], "rejected": row["chosen"]} if index in wrong else {}

    return pairs.map(swap, with_indices=True, keep_in_memory=True)


def mix(safety: Dataset, helpful: Dataset, ratio: float, seed: int) -> Dataset:
    """All safety examples and `ratio` times as many helpful ones, in an order that the seed decides.

    Args:
        safety: normalised.
        helpful: normalised. The column `rejected` is kept only if both data sets have it; in any other column that one
            of them lacks, its rows have None.
        ratio: helpful examples for each safety example, >= 0; they are drawn without replacement.
        seed: decides which are drawn, and the order.

    Raises:
        InputError: if there are too few helpful examples.
    """
    if not (math.isfinite(ratio) and ratio >= 0):
        raise InputError(f"the ratio of helpful to safety examples is {ratio}; it must be 0 or more")
    needed = round(ratio * len(safety))
    if needed > len(helpful):
        raise InputError(
            f"a ratio of {ratio} needs {needed} helpful examples for {len(safety)} safety examples, and there are "
            f"{len(helpful)};\nlower the ratio to {math.floor(100 * len(helpful) / len(safety)) / 100}, or give more"
        )
    rng = np.random.default_rng(seed)
    drawn = helpful.select(rng.permutation(len(helpful))[:needed], keep_in_memory=True)
    if ("rejected" in safety.column_names) != ("rejected" in helpful.column_names):
        safety, drawn = (
            part.remove_columns([column for column in part.column_names if column == "rejected"])
            for part in (safety, drawn)
        )
    both = concatenate_datasets([safety, drawn])
    return both.select(rng.permutation(len(both)), keep_in_memory=True)


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 (hex) of the rows in their order, wherever they are cached and in whatever order their columns are.

    The rows must be JSON-able, as those of normalised data sets are; they are read in batches.
    """
    digest = hashlib.sha256()
    for batch in dataset.iter(batch_size=1000):
        columns = sorted(batch)
        for values in zip(*(batch[column] for column in columns), strict=True):
            row = json.dumps(dict(zip(columns, values, strict=True)), sort_keys=True)
            digest.update(f"{row}\n".encode())
    return digest.hexdigest()
