"""Parse the rows of a dataset in batches, and count unusable rows by cause."""

import importlib.metadata
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, Features, List, Value

from sails_align.core.errors import InputError
from sails_align.data.files import UNREADABLE
from sails_align.data.loading import cache_errors
from sails_align.data.messages import BadRowError, LeftOutRowError

logger = logging.getLogger(__name__)

MESSAGES = List({"role": Value("string"), "content": Value("string")})
TYPES = {"prompt": MESSAGES, "chosen": Value("string"), "rejected": Value("string"), "labelled_good": Value("bool")}
EXTRAS = {"category": Value("string"), "harmful": Value("bool")}
"""Columns that are passed on as they are, where the source has them."""

Parser = Callable[[Mapping[str, Any]], dict[str, Any]]
"""A row, with its column names in lower case -> columns of `TYPES`; raises `BadRowError` if it cannot be used."""
OnBadRows = Literal["error", "skip"]


@dataclass(frozen=True)
class Normalized:
    """A dataset in the common form that all other code reads."""

    dataset: Dataset
    """Columns `prompt` (messages, the last one of the user), `chosen` (text), `rejected` (text; only if the source has
    it), and `category` (text) and `harmful` (bool) if the source has them."""
    dropped: dict[str, int]
    """Rows left out, counted by cause."""
    n_paired: int = 0
    """Rows labelled bad whose responses are now rejected ones, of other rows."""


class _BatchReader:
    """For `Dataset.map`: parses batches of rows; leaves bad ones out, counted by cause, with the first of each."""

    def __init__(self, parser: Parser, kept: list[str], on_bad_rows: OnBadRows):
        self.parser, self.kept = parser, kept
        self.dropped: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        """Rows that are no error (`LeftOutRowError`)."""
        self.first_rows: dict[str, list[int]] = {}
        # Part of what `map` hashes to name its cache. The mode: in "error" the cache may be deleted, which another data
        # set must not share. The version: what was made from an earlier one's rows must not be taken for ours.
        self.mode, self.version = on_bad_rows, importlib.metadata.version("sails-align")

    def __call__(self, batch: Mapping[str, list], numbers: list[int]) -> dict[str, list]:
        rows: list[dict[str, Any]] = []
        for number, *values in zip(numbers, *(batch[column] for column in batch), strict=True):
            row = dict(zip(batch, values, strict=True))
            try:
                if row.get(UNREADABLE) is not None:
                    raise BadRowError(row[UNREADABLE])
                rows.append({**_extras(row), **self.parser(row)})
            except BadRowError as bad:
                (self.left_out if isinstance(bad, LeftOutRowError) else self.dropped)[str(bad)] += 1
                self.first_rows.setdefault(str(bad), [])
                if len(self.first_rows[str(bad)]) < 3:
                    self.first_rows[str(bad)].append(number)
        return {column: [row[column] for row in rows] for column in self.kept}

    def report(self, counts: Counter[str]) -> str:
        """Return causes with counts and the first rows of each."""
        return "; ".join(
            f"{cause}: {count} (row {', '.join(map(str, self.first_rows[cause]))}{', ...' if count > 3 else ''})"
            for cause, count in counts.most_common()
        )


def _extras(row: Mapping[str, Any]) -> dict[str, Any]:
    category = None if row.get("category") is None else str(row["category"])
    return {"category": category, "harmful": is_true(row.get("harmful"))}


def is_true(value: Any) -> bool | None:
    """Return a truth value, which is a text in csv files; raise `BadRowError` for anything else."""
    value = (
        {"true": True, "false": False, "": None}.get(value.strip().lower(), value) if isinstance(value, str) else value
    )
    if not isinstance(value, bool | None):
        raise BadRowError("harmful is neither true nor false")
    return value


def read_rows(
    dataset: Dataset, read: Iterable[str], kept: list[str], parser: Parser, name: str, on_bad_rows: OnBadRows
) -> Normalized:
    """Parse every row and write the usable ones to the cache of datasets, next to the source.

    The parser reads the columns `read`, in lower case (missing ones are not an error), and gives those `kept`.
    Unusable rows are an error, or with "skip" left out and reported, as ties are in any case. Raises `InputError` for
    unusable rows, and if no row is left.
    """
    if len(dataset) == 0:
        raise InputError(f"{name} is empty; give a data set that has rows")
    columns = columns_by_lower_name(dataset)
    wanted = {columns[column]: column for column in [*read, *EXTRAS, UNREADABLE] if column in columns}
    source = dataset.select_columns(list(wanted)).rename_columns(wanted)
    reader = _BatchReader(parser, kept, on_bad_rows)
    with cache_errors():
        result = source.map(
            reader,
            batched=True,
            with_indices=True,
            remove_columns=source.column_names,
            features=Features({column: {**TYPES, **EXTRAS}[column] for column in kept}),
            load_from_cache_file=False,  # the rows must be counted
            desc="Reading rows",
        )
    is_error = on_bad_rows == "error" and bool(reader.dropped)
    counts = reader.dropped if is_error else reader.dropped + reader.left_out
    bad = counts.total()
    summary = f"{bad} of {len(dataset)} rows of {name} cannot be used (rows counted from 0):\n{reader.report(counts)}"
    if is_error or len(result) == 0:
        for file in result.cache_files:
            Path(file["filename"]).unlink(missing_ok=True)
        remedy = "repair them, or leave them out with --on_bad_rows skip" if bad < len(dataset) else "give other data"
        raise InputError(f"{summary}\n{remedy}")
    if bad:
        logger.warning("left out: %s", summary)
    return Normalized(result, dict(counts))


def columns_by_lower_name(dataset: Dataset) -> dict[str, str]:
    """Lower-case name -> column (JailbreakBench writes Goal and Category); of two that collide, the lower-case one."""
    return {name.lower(): name for name in sorted(dataset.column_names)}
