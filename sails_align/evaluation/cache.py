"""Completions and verdicts that were paid for once, kept in a SQLite file that several processes can share."""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sails_align.core.errors import InputError

FORMAT = 1
WAIT = 60.0
"""Seconds to wait for another process that writes."""
AT_A_TIME = 500
"""Keys looked up by one statement."""


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
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"cannot use the cache {path}: {error};\ngive another file with --cache_path") from error

    def _prepare(self) -> None:
        execute = self._connection.execute
        tables = {name for (name,) in execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "entries" not in tables:
            raise InputError(f"{self.path} is the data base of something else; give another file with --cache_path")
        execute("PRAGMA journal_mode=WAL")  # readers and a writer do not wait for each other
        execute(
            "PRAGMA synchronous=NORMAL"
        )  # a killed process loses nothing; a power failure may lose the last entries
        execute("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
        version = execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, FORMAT):
            raise InputError(f"{self.path} is a cache of format {version}, not {FORMAT}; give another --cache_path")
        execute(f"PRAGMA user_version={FORMAT}")

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of the keys that are there."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Any] = {}
        for start in range(0, len(wanted), AT_A_TIME):
            part = wanted[start : start + AT_A_TIME]
            marks = ",".join("?" * len(part))
            rows = self._execute(f"SELECT key, value FROM entries WHERE key IN ({marks})", part)
            found |= {key: json.loads(value) for key, value in rows}
        return found

    def put(self, values: Mapping[str, Any]) -> None:
        """Add or replace values."""
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", rows)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise self._unusable(error) from error

    def _execute(self, statement: str, values: list[str]) -> list[tuple[str, str]]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: sqlite3.Error) -> InputError:
        return InputError(f"cannot use the cache {self.path}: {error};\ngive another file with --cache_path")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
