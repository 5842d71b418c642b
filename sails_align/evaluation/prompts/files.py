"""Read files of prompts that `datasets` cannot read as they are: texts, csv files without a header, JSON objects."""

import gzip
import json
import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas

from sails_align.core.errors import InputError
from sails_align.data.files import UNREADABLE, ending, separator
from sails_align.data.loading import load_rows
from sails_align.evaluation.prompts.definitions import Row, Subset
from sails_align.evaluation.prompts.rows import Table, table_of

logger = logging.getLogger(__name__)


def read_table(
    file: Path,
    names: Collection[str],
    subset: Subset | None = None,
    category: str | None = None,
    *,
    mark_unreadable: bool = False,
) -> Table:
    """Read a local file: what `load_rows` reads, a text with one prompt a line, or a csv file without a header.

    Args:
        file: its path.
        names: what its columns may be called, in lower case; if none of them is so called, there may be no header.
        subset: the table of a known set that it is a copy of.
        category: of all its prompts.
        mark_unreadable: keep rows that cannot be read, with the cause, as `load_rows` does; else they are an error.

    Raises:
        InputError: if it cannot be read.
    """
    if ending(file) == ".txt":
        return Table(_lines(file, mark_unreadable), ("prompt",), str(file), subset, category)
    content = object_in(file) if subset is not None and subset.unpack is not None else None
    if content is not None and subset is not None and subset.unpack is not None:
        rows = subset.unpack(content)
        return Table(rows, tuple(rows[0]) if rows else tuple(content), str(file), subset, category)
    if ending(file) in (".csv", ".tsv") and _has_no_header(file, names):
        return _without_header([file], str(file), subset, category)
    return table_of(load_rows(str(file), mark_unreadable=mark_unreadable), str(file), subset, category)


def headless_folder(folder: Path, names: Collection[str]) -> Table | None:
    """Return the table of a folder of csv files without header lines, as HEx-PHI's; None if it is none."""
    files = sorted(folder.glob("*.csv"), key=lambda file: (len(file.name), file.name))
    are_headless = bool(files) and all(_has_no_header(file, names) for file in files)
    return _without_header(files, str(folder)) if are_headless else None


def _without_header(
    files: Sequence[Path], where: str, subset: Subset | None = None, category: str | None = None
) -> Table:
    logger.warning("%s has no header line: its one column is taken for the prompts", where)
    rows = [row for file in files for row in headless(file, ("prompt",))]
    return Table(rows, ("prompt",), where, subset, category)


def object_in(file: Path) -> Mapping[str, Any] | None:
    """Return the content of a JSON file that is one object; None if it is a list, or has an object a line."""
    if file.suffix.lower() != ".json":
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):  # `load_rows` says what is wrong with it
        return None
    return content if isinstance(content, dict) else None


def _lines(file: Path, mark_unreadable: bool) -> list[Row]:
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix.lower() == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:  # also of gzip
        raise InputError(f"{file} cannot be read: {error};\ngive a text in UTF-8, with one prompt a line") from error
    lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
    rows: list[Row] = []
    for number, line in enumerate(filter(bytes.strip, lines)):
        try:
            rows.append({"prompt": line.decode().strip()})
        except UnicodeDecodeError as error:
            if not mark_unreadable:
                raise InputError(
                    f"{file} cannot be read: line {number} (counted from 0) is not UTF-8;\ngive a text in UTF-8, with "
                    "one prompt a line, or leave such lines out with --on_bad_rows skip"
                ) from error
            rows.append({"prompt": None, UNREADABLE: "the row is not UTF-8"})
    return rows


def _has_no_header(file: Path, names: Collection[str]) -> bool:
    """Tell whether the first line of a file is a prompt.

    A file of several columns without a header is an error: what they mean cannot be told.
    """
    try:
        first = _read(file, header=None, nrows=1)
    except InputError:
        return False  # `load_rows` says which row it is
    cells = [str(value).strip() for value in first.iloc[0]] if len(first) else []
    if not any(map(_is_sentence, cells)) or any(cell.lower() in names for cell in cells):
        return False
    if len(cells) > 1:
        raise InputError(
            f"{file} has no header line: its first line is {', '.join(cells)[:80]!r};\n"
            "write one, such as prompt,category, or say which column of it is the prompt; name a list of prompts .txt"
        )
    return True


def _is_sentence(cell: str) -> bool:
    words = len(cell.split())
    return words > 3 or (words > 1 and cell.endswith((".", "?", "!")))


def headless(file: Path, header: Sequence[str]) -> list[Row]:
    """Read a csv file that has no header."""
    table = _read(file, header=None)
    if table.shape[1] != len(header):
        raise InputError(
            f"{file} has {table.shape[1]} columns, where {len(header)} is expected ({', '.join(header)});\n"
            "give the file as it is in the repository, or one with a header under another name"
        )
    return table.set_axis(list(header), axis=1).to_dict("records")  # pyright: ignore[reportReturnType]


def _read(file: Path, **options: Any) -> pandas.DataFrame:
    try:
        return pandas.read_csv(file, sep=separator(file), dtype=str, keep_default_na=False, **options)
    except pandas.errors.EmptyDataError:
        return pandas.DataFrame()
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        raise InputError(
            f"{file} cannot be read: {str(error).strip()};\ngive the file as it is in the repository, in UTF-8"
        ) from error
