"""Prepare local files for `datasets`: unpack them, and mark the rows that it cannot read.

One row that is not UTF-8, has a lone surrogate or is nested too deeply makes `datasets` refuse its whole file, or ends
the process. Such rows are replaced by one with the column `UNREADABLE`, which holds the cause, in a copy of the file.
"""

import codecs
import csv
import gzip
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""Endings of data files -> the builder of `datasets` that reads them."""
UNREADABLE = "unreadable_row"
MAX_DEPTH = 50
"""Of lists and objects in a row. Far deeper ones end the process, in pyarrow."""


def ending(path: Path) -> str:
    """Return the ending of a file's name in lower case, without .gz."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def separator(path: Path) -> str:
    """Return what separates the columns of a csv or tsv file."""
    return "\t" if ending(path) == ".tsv" else ","


def prepared(path: Path, folder: Path, strict: bool = False) -> Path:
    """Return a file that `datasets` can read: the file itself, or else a copy in `folder`.

    With `strict`, lines of a jsonl file that are not JSON are marked as well, which takes longer.
    """
    if path.name.lower().endswith(".gz"):
        plain = folder / path.name[:-3]
        if not plain.is_file():
            try:
                with gzip.open(path) as packed:
                    _write(plain, lambda file: shutil.copyfileobj(packed, file))
            except (EOFError, zlib.error) as error:
                raise ValueError(str(error)) from error
        path = plain
    kind = ending(path)
    if kind not in (".json", ".jsonl", ".csv", ".tsv"):
        return path
    with path.open("rb") as lines:
        if lines.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path.name} is UTF-16; save it as UTF-8")
        lines.seek(0)
        is_good = all(_cause(line, strict and kind == ".jsonl", kind in (".json", ".jsonl")) is None for line in lines)
    if is_good:
        return path
    rows = _csv_rows(path) if kind in (".csv", ".tsv") else _json_rows(path, strict)
    copy = folder / f"{path.name}.marked.jsonl"
    _write(copy, lambda file: file.writelines(row + b"\n" for row in rows))
    return copy


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _cause(line: bytes, strict: bool, is_json: bool) -> str | None:
    """Return why a line cannot be read, if so; only suspicious lines are parsed, unless `strict`."""
    try:
        line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "the row is not UTF-8"
    is_suspicious = is_json and (rb"\ud" in line.lower() or line.count(b"[") + line.count(b"{") > MAX_DEPTH)
    if not (strict or is_suspicious) or not line.strip():
        return None
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except RecursionError:
        return "the row is nested too deeply"
    except ValueError:  # in a file of several lines a row, its parts are none
        return "the row is not JSON" if strict else None
    if strict and not isinstance(row, dict):
        return "the row is not a JSON object"
    return cause_in(row)


def cause_in(row: Any) -> str | None:
    """Return why a parsed row cannot be read, if so."""
    if _depth_exceeds(row, MAX_DEPTH + isinstance(row, list)):
        return "the row is nested too deeply"
    text = json.dumps(row, ensure_ascii=False, default=str)
    if text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text):
        return None
    is_bytes = any("\udc80" <= letter <= "\udcff" for letter in text)  # what `surrogateescape` makes of them
    return "the row is not UTF-8" if is_bytes else "the row has a lone surrogate (\\ud800 to \\udfff), which is no text"


def _depth_exceeds(value: Any, depth: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_depth_exceeds(part, depth - 1) for part in parts)


def _marked(cause: str) -> bytes:
    return json.dumps({UNREADABLE: cause}).encode()


def _json_rows(path: Path, strict: bool) -> Iterator[bytes]:
    content = path.read_bytes()
    if content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"[":
        for line in io.BytesIO(content):
            if line.strip():
                cause = _cause(line, strict, is_json=True)
                yield line.rstrip(b"\r\n") if cause is None else _marked(cause)
        return
    try:
        rows = json.loads(content.decode("utf-8-sig", "surrogateescape"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    yield from _written(rows)


def _csv_rows(path: Path) -> Iterator[bytes]:
    csv.field_size_limit(2**31 - 1)  # the usual limit, 128 KiB, is less than a long text has
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield from _written(csv.DictReader(file, delimiter=separator(path)))


def _written(rows: Iterable[Any]) -> Iterator[bytes]:
    for row in rows:
        cause = cause_in(row)
        yield json.dumps(row).encode() if cause is None else _marked(cause)
