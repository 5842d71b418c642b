"""Hash the files and folders that options name: a result is known by their content, not by their path."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from sails_align.core.artifacts import content_hash
from sails_align.experiments.plan import option_groups
from sails_align.models.contents import content_of

NAMES_FILES = re.compile(
    r"(path|server_template|model|dataset_name|prompts|reference|compare|subspace|(?<!dataset_)config|config_file|deepspeed|tasks|base|testbed"
    r"|suffixes|freeze_units|guard|gate)$"
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


def _named(options: Mapping[str, Sequence[str]]) -> Iterator[Path]:
    for option, values in options.items():
        for value in values if option != "--output_dir" else ():
            name = value.rpartition("=")[2]  # of `harmbench=FILE`
            path = Path(name).expanduser()
            if name and (NAMES_FILES.search(option) or "/" in name) and _exists(path):
                yield path
                if option == "--config":
                    yield from _named(_options_in(path))


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
    if not isinstance(values, dict):
        return {}
    lists = {name: of if isinstance(of, list) else [of] for name, of in values.items()}
    return {f"--{name}": [one for one in of if isinstance(one, str)] for name, of in lists.items() if name != "config"}


def _is_in(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.absolute().is_relative_to(folder.absolute()) for folder in folders)
