"""Suggest what a user may have meant: the closest of the names that are known, or of the files that are there."""

import difflib
from collections.abc import Iterable
from pathlib import Path

SIMILAR = 0.6
"""Least share of characters that two names have in common."""


def closest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that is most like a given one, whatever its case and its hyphens; None if none is like it."""
    by_key = {_key(known): known for known in sorted(names)}  # of --a-b and --a_b, the latter
    key = _key(name)
    if found := difflib.get_close_matches(key, by_key, n=1, cutoff=SIMILAR):
        return by_key[found[0]]
    longer = [known for other, known in by_key.items() if len(key) > 1 and other.startswith(key)]
    return min(longer, key=len, default=None)


def suggestion(name: str, names: Iterable[str]) -> str:
    """End a message that lists the known names: with the closest one, or with nothing if none is close."""
    near = closest(name, names)
    return "" if near is None else f"; did you mean {near!r}?"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """End a message about an unknown name: with the closest one, or with all of them if none is close."""
    known = list(names)
    return suggestion(name, known) or f"; choose one of {', '.join(known)}"


def did_you_mean_path(name: str, *names: str) -> str:
    """End a message about a path that is not there: with the closest file or folder, or with nothing.

    Args:
        name: as the user wrote it.
        names: other things that could be meant in place of a path, such as `testbed`.
    """
    path = Path(name)
    try:
        beside = [str(path.parent / file.name) for file in path.parent.iterdir() if _is_offered(file)]
    except (OSError, ValueError):  # the folder is not there either, or the name cannot be one
        beside = []
    return suggestion(str(path), [*names, *(other for other in beside if _is_like(other, path))])


def _is_offered(file: Path) -> bool:
    return not file.name.startswith(".") and file.exists()  # not a link to nothing


def _is_like(other: str, path: Path) -> bool:
    return closest(path.name, [Path(other).name]) is not None


def _key(name: str) -> str:
    return name.lower().replace("_", "-")
