"""Keep completions and verdicts in a SQLite file that several processes can share: nothing is paid for twice."""

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sails_align.core.errors import InputError

FORMAT = 1
WAIT = 60.0
"""Seconds to wait for another process that writes."""


class Cache:
    """JSON values by content hash. A value is on disk once `put` has returned, also if the process is killed then.

    Args:
        path: of the file; it is made if it is not there.

    Raises:
        InputError: if it cannot be opened, or is no cache of this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error
        tables = {name for (name,) in self._execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "entries" not in tables:
            raise InputError(f"{path} is the data base of something else; give another file with --cache_path")
        self._execute("PRAGMA journal_mode=WAL")  # readers and a writer do not wait for each other
        # A killed process loses nothing; a power failure may lose the last entries.
        self._execute("PRAGMA synchronous=NORMAL")
        self._execute("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
        ((version,),) = self._execute("PRAGMA user_version")
        if version not in (0, FORMAT):
            raise InputError(f"{path} is a cache of format {version}, not {FORMAT}; give another --cache_path")
        self._execute(f"PRAGMA user_version={FORMAT}")

    def get(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return the values of the keys that are there."""
        rows = self._execute(
            "SELECT key, entries.value FROM entries WHERE key IN (SELECT value FROM json_each(?))", json.dumps(keys)
        )
        return {key: json.loads(value) for key, value in rows}

    def put(self, key: str, value: Any) -> None:
        """Add or replace a value."""
        self._execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", key, json.dumps(value))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _execute(self, statement: str, *values: str) -> list[Any]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> InputError:
        return InputError(f"cannot use the cache {self.path}: {error};\ngive another file with --cache_path")
