"""Know the options of another library's dataclasses without importing it.

TRL's SFTConfig alone takes seven seconds to import, with torch. Its names are enough to tell a misspelt option, and to
complete one; they are read from the source of the version that is installed.
"""

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class LibraryOptions:
    """Options that are accepted by name, to be read once their library is imported."""

    files: tuple[str, ...]
    """The sources of the dataclass and its parents, such as "trl/trainer/sft_config.py"."""
    shown: Mapping[str, str]
    """Of some options, what `--help` says; the others are shown by `--help-all`, which imports the library."""

    def names(self) -> tuple[str, ...]:
        """Return the names of all options; none if the library's files lie elsewhere."""
        found = [_fields(name) for name in self.files]
        return tuple(dict.fromkeys(name for names in found for name in names)) if all(found) else ()


@cache
def _fields(file: str) -> tuple[str, ...]:
    """Return the fields of the dataclasses in a file."""
    package, _, path = file.partition("/")
    spec = importlib.util.find_spec(package)
    source = None if spec is None or spec.origin is None else Path(spec.origin).parent / path
    if source is None or not source.is_file():
        return ()
    classes = [node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    lines = [line for node in classes for line in node.body if isinstance(line, ast.AnnAssign)]
    return tuple(line.target.id for line in lines if isinstance(line.target, ast.Name))
