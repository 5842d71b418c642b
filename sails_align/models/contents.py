"""Hash the content of files and folders: models with what decides a response, and any other folder as it is."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import file_hash
from sails_align.core.errors import InputError
from sails_align.core.log import LOG_FILE
from sails_align.models.adapters import CONFIG
from sails_align.models.resolve import ALSO_DECIDE
from sails_align.models.spec import deciding_files


def content_of(path: Path) -> Any:
    """Return what changes whenever a file, a model with its base, or another folder does.

    Raises:
        InputError: if a file cannot be read.
    """
    try:
        if path.is_file():
            return _file_hash(path)
        if not any((path / name).is_file() for name in ("config.json", CONFIG)):
            files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != LOG_FILE)
            return {str(file.relative_to(path)): _file_hash(file) for file in files if not file.name.startswith(".")}
        hashes = {file.name: _file_hash(file) for file in deciding_files(path, ALSO_DECIDE)}
        return {**hashes, **_base_of(path)}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check its permissions") from error


def _base_of(folder: Path) -> dict[str, Any]:
    """Return the content of an adapter's base model, if that is a local folder."""
    try:
        name = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        return {"base": content_of(Path(name))} if Path(name).is_dir() and Path(name) != folder else {}
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # the command that uses it says so
        return {}


def _file_hash(path: Path) -> str:
    about = path.stat()  # the time of a change, unlike that of a modification, cannot be set
    return _hash_of(path, about.st_ino, about.st_size, about.st_ctime_ns)


@cache
def _hash_of(path: Path, *_: int) -> str:
    return file_hash(path)
