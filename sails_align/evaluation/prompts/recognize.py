"""Recognize known prompt sets by what a file holds, so that none is taken for another one."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sails_align.core.errors import InputError
from sails_align.data.files import BUILDERS, ending
from sails_align.data.folders import declared_configs
from sails_align.evaluation.prompts.definitions import PromptSet, Row
from sails_align.evaluation.prompts.sets import PROMPT_SETS

logger = logging.getLogger(__name__)


def fitting(columns: Iterable[str]) -> list[PromptSet]:
    """Return the known sets whose columns these are: those with the most columns, of one source or several."""
    present = {column.lower() for column in columns}
    fits = [known for _, known in PROMPT_SETS.items() if known.signature and known.signature <= present]
    most = max((len(known.signature) for known in fits), default=0)
    return [known for known in fits if len(known.signature) == most]


def suggestion(columns: Iterable[str], path: str) -> str:
    """Return a hint, on a line of its own, that a file is a known set; nothing if it is none."""
    return _hint("Its columns are those", fitting(columns), path)


def suggestion_for_object(content: Mapping[str, Any], path: str) -> str:
    """Return the same for a JSON file that is one object."""
    unpacked = [(known, subset.unpack) for _, known in PROMPT_SETS.items() for subset in known.subsets if subset.unpack]
    return _hint("Its layout is that", [known for known, unpack in unpacked if unpack(content)], path)


def _hint(sign: str, fits: Sequence[PromptSet], path: str) -> str:
    names = [known.name for known in fits]
    if not names:
        return ""
    others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
    return f"\n{sign} of {names[0]}{others}: --prompts {names[0]}={path} reads it as that set"


def copy_in(known: PromptSet, folder: Path) -> Path | None:
    """Return the only file of a folder that can be the copy of a set, by its name.

    None if the folder declares configurations or is a saved dataset, or has several files that are not told apart.
    Raises `InputError` if no file, or more than one, can be the copy, and the set is one of several in its repository.
    """
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")) or declared_configs(folder):
        return None
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and ending(file) in BUILDERS]
    words = [other.word for other in _siblings(known) if other.word]
    named = [file for file in files if known.word and known.word in file.name.lower()]
    others = [file for file in files if not any(word in file.name.lower() for word in words)]
    found = next((found[0] for found in (named, others) if len(found) == 1), None)
    if found is None and words:
        raise InputError(f"{folder}: it is not clear which of its files is {known.name}; give {known.name}=FILE")
    return found


def _siblings(known: PromptSet) -> list[PromptSet]:
    """Return the other sets of the same source."""
    return [other for _, other in PROMPT_SETS.items() if other.source is known.source and other is not known]


def check_copy(known: PromptSet, columns: Sequence[str], kept: Sequence[Row], n_rows: int, where: str) -> None:
    """Refuse a file that is a copy of another known set.

    Args:
        known: the set that it is said to be.
        columns: of the file.
        kept: its rows of that set.
        n_rows: the number of all its rows.
        where: its path.

    Raises:
        InputError: if it is the copy of another set, or has no row of this one.
    """
    fits = fitting(columns)
    other = fits[0] if fits and known not in fits else None
    # A copy of this set with fewer columns may look like another set, but it has not as many rows as that.
    if other is not None and (not other.signature < known.signature or n_rows in other.counts):
        raise _not_this(known, f"it has the columns of {other.name}", where, other.name)
    if not kept:
        raise _not_this(known, f"none of its {n_rows} rows belongs to that set", where)
    name = where.rstrip("/").rpartition("/")[2].lower()
    for other in _siblings(known) if len(kept) == n_rows else ():
        if other.word and other.word in name and known.word not in name:
            raise _not_this(known, "its name says so", where, other.name)
        if known.refuse is None and n_rows in other.counts and n_rows not in known.counts:  # its content tells best
            raise _not_this(known, f"it has the {n_rows} rows of {other.name}", where, other.name)
    if sign := known.refuse(kept) if known.refuse is not None else None:
        raise _not_this(known, sign, where)


def _not_this(known: PromptSet, sign: str, where: str, other: str | None = None) -> InputError:
    remedy = f"give {other}={where}, or a copy of {known.name}" if other else f"give a copy of {known.name}"
    return InputError(f"{where} is not {known.name}: {sign};\n{remedy}, or the path alone with --kind")


def check_count(known: PromptSet, n_rows: int, where: str) -> None:
    """Warn of a copy that is not whole, or of a set that has changed."""
    if known.counts and n_rows not in known.counts:
        published = " or ".join(f"{count:,}" for count in known.counts)
        logger.warning("%s: %d rows, where the published set has %s", where, n_rows, published)
