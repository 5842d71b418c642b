"""Edits of trained weights, one file each: a finished run in, a folder with a model or an adapter out.

An edit's module has a function `edit(run, output, options, finish)`, which makes the folder `output`, calls `finish`
with it before it appears, and returns what it measured: an object whose `report()` yields the lines that
`sails edit NAME` prints.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sails_align.core.registry import Entry, Registry
from sails_align.edits.options import MergeOptions

EDITS = Registry(
    "edit",
    {
        "merge": Entry(
            "sails_align.edits.merge:edit",
            "Merge a LoRA adapter into its base model, and check the result.",
            MergeOptions,
        ),
    },
)


def run(
    name: str,
    folder: str | Path,
    output: str | Path,
    options: Any = None,
    finish: Callable[[Path], object] | None = None,
) -> Any:
    """Run an edit on a finished run.

    Args:
        name: in `EDITS`.
        folder: of the run, or of any adapter that the edit takes.
        output: the folder to make.
        options: of the edit's own class; None: the defaults.
        finish: called with the folder before it appears, to add a model card.

    Raises:
        InputError: if there is no such edit; or from the edit.
    """
    entry = EDITS.get(name)
    if options is None and entry.options is not None:
        options = entry.options()
    return entry.load()(Path(folder), Path(output), options, finish)
