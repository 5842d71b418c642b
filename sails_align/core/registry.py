"""Register things of one kind, such as initializers or judges, by name, without importing them.

Each folder of such things has one registry in its `__init__.py`. Help texts, choices and errors are made of its names
and summaries; `entry.load()` imports the code when it is used.
"""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sails_align.core.errors import InputError
from sails_align.core.suggestions import did_you_mean


@dataclass(frozen=True)
class Entry:
    """Point to the code of one thing, with its help text."""

    target: str
    """`package.module:object`: imported by `load`, and not before."""
    summary: str
    """One line for help and tables."""
    options: type | None = None
    """Frozen dataclass of the options that only this thing has."""

    def __post_init__(self) -> None:
        module, _, name = self.target.partition(":")
        assert module, f"{self.target!r} is not of the form package.module:object"
        assert name, f"{self.target!r} is not of the form package.module:object"

    def load(self) -> Any:
        """Import the object."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


E = TypeVar("E")


class Registry(Generic[E]):
    """Hold the entries of one kind of thing, in the order in which help shows them."""

    def __init__(self, kind: str, entries: Mapping[str, E]) -> None:
        """Take the entries by name; `kind` is the name of one of them in errors, such as "judge"."""
        self.kind = kind
        self._entries = dict(entries)

    def names(self) -> tuple[str, ...]:
        """Return all names, in order."""
        return tuple(self._entries)

    def items(self) -> Iterable[tuple[str, E]]:
        """Return all names with their entries, in order."""
        return self._entries.items()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def get(self, name: str) -> E:
        """Return the entry of a name; raise `InputError` with the closest name if there is none."""
        if name not in self._entries:
            raise InputError(f"there is no {self.kind} {name!r}{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def register(self, name: str, entry: E) -> None:
        """Add an entry from a layer above, or replace one (a module may be imported twice)."""
        self._entries[name] = entry
