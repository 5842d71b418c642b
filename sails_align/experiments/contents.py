"""Hash the files and folders that options name: a result is known by their content, not by their path."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sails_align.core.artifacts import content_hash, file_hash
from sails_align.core.errors import InputError
from sails_align.core.log import LOG_FILE
from sails_align.experiments.plan import option_groups
from sails_align.models.adapters import CONFIG
from sails_align.models.resolve import ALSO_DECIDE
from sails_align.models.spec import deciding_files

NAMES_FILES = re.compile(
    r"(path|model|dataset_name|prompts|reference|compare|subspace|(?<!dataset_)config|config_file|deepspeed|tasks|base|testbed"
    r"|suffixes)$"
)
"""Options whose values can be files or folders; of others, values with a slash in them can, too."""


def contents_hash(words: Sequence[str], made: Sequence[Path] = ()) -> str:
    """Return the hash of the content of all files and folders that options name; empty without any.

    Args:
        words: of a command line. The options in a `--config` file count, too.
        made: folders that the work itself makes, which are left out.

    Raises:
        InputError: if a file cannot be read.
    """
    found = {str(path): content_of(path) for path in _named(option_groups(words)) if not _is_in(path, made)}
    return content_hash(found) if found else ""


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


def _named(options: Mapping[str, Sequence[str]]) -> Iterator[Path]:
    for option, values in options.items():
        for value in values if option != "--output_dir" else ():
            name = value.rpartition("=")[2]  # of `harmbench=FILE`
            if name and (NAMES_FILES.search(option) or "/" in name) and _exists(Path(name).expanduser()):
                yield Path(name).expanduser()
                if option == "--config":
                    yield from _named(_options_in(Path(name)))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # of a text that is no path, such as one that is too long
        return False


def _options_in(config: Path) -> dict[str, list[str]]:
    """Return the texts in a file of options; a command says what is wrong with the file."""
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    lists = {name: of if isinstance(of, list) else [of] for name, of in values.items()} if values else {}
    return {f"--{name}": [one for one in of if isinstance(one, str)] for name, of in lists.items() if name != "config"}


def _is_in(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.absolute().is_relative_to(folder.absolute()) for folder in folders)
