"""Define what a known prompt set is: its source, its tables, its columns, and how a copy of it is recognized."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sails_align.evaluation.records import Kind, Message

Row = Mapping[str, Any]
"""With column names in lower case."""
Columns = Mapping[str, tuple[str, ...]]
"""Role -> names of its column in lower case, of which the first one found counts."""
COLUMNS: Columns = {
    "prompt": (
        *("messages", "prompt", "goal", "forbidden_prompt", "instruction", "question", "prompts_final", "behavior"),
        *("conversations", "text", "turns", "user_input", "augq"),
    ),
    "category": ("category", "semanticcategory"),
    "kind": ("kind",),
    "target": ("target",),
    "reference": ("reference",),
    "context": ("context", "contextstring"),
    "id": ("id",),
}
"""The columns of any file; the originals of known sets and their copies on the hub differ in them."""


@dataclass(frozen=True)
class Subset:
    """Define one table of a set."""

    kind: Kind | Callable[[Row], Kind]
    """Of all its prompts, or of a row; the latter raises `BadRowError` if it says nothing."""
    config: str | None = None
    split: str = "train"
    pattern: str | None = None
    """Files in the repository, if `datasets` cannot read the repository itself."""
    word: str = ""
    """Part of the path of a local copy that tells this table from the set's others."""
    category: str | Callable[[Path], str] | None = None
    """Of all its prompts, or of those in a file. None: a column has it, or else it is the set's name."""
    header: tuple[str, ...] | None = None
    """Names of the columns of csv files without a header."""
    row: Callable[[Row], Row | None] | None = None
    """Returns a row in the usual columns; None if it belongs to another set of the same file."""
    unpack: Callable[[Mapping[str, Any]], Sequence[Row]] | None = None
    """Returns the rows of a JSON file that is one object; none if it is a file of another kind."""


@dataclass(frozen=True)
class PromptSource:
    """Name the source of a set."""

    hub_id: str | None
    """None if it is not on the hub."""
    licence: str
    citation: str
    gated: bool = False
    """Whether the user must accept a licence on the hub first."""
    home: str = ""
    """Its page, if it is not on the hub."""

    @property
    def url(self) -> str:
        """The page with the licence."""
        return self.home if self.hub_id is None else f"https://huggingface.co/datasets/{self.hub_id}"


@dataclass(frozen=True)
class PromptSet:
    """Define a known prompt set."""

    name: str
    source: PromptSource
    subsets: tuple[Subset, ...]
    columns: Columns = field(default_factory=lambda: COLUMNS)
    counts: tuple[int, ...] = ()
    """Numbers of rows of its published versions; empty if they are not known for sure."""
    signature: frozenset[str] = frozenset()
    """Columns of the original, in lower case, by which a file is recognized; empty if other files have them, too."""
    word: str = ""
    """Part of a file's name that tells this set from the others of the same source."""
    refuse: Callable[[Sequence[Row]], str | None] | None = None
    """Returns what shows that rows are those of another set of the same source, if anything does."""


def prompt_id(messages: Sequence[Message]) -> str:
    """Return the id of a prompt: a hash of its messages, equal in every copy of a set."""
    said = [[message["role"], message["content"].strip()] for message in messages]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
