"""The command `sails edit`: edit trained weights, into a new folder. `sails merge` is short for `sails edit merge`.

sails edit merge runs/mine --output runs/mine-merged
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sails_align import edits
from sails_align.core.command_line import CommandLine


@dataclass(frozen=True)
class EditFolders:
    """The finished run, and the edited model."""

    run: Path = field(
        metadata={"help": "Folder of a finished run, or any folder with a LoRA adapter.", "positional": True}
    )
    output: Path = field(metadata={"help": "The folder to make."})


def main(argv: Sequence[str], prog: str | None = None) -> None:
    """Run the edit that the first argument names, write a model card, and print what the edit reports."""
    name, *options = argv
    entry = edits.EDITS.get(name)
    classes = [EditFolders] if entry.options is None else [EditFolders, entry.options]
    folders, *chosen = CommandLine.read(options).parse(classes, prog=prog)
    from sails_align.export.card import write_card

    def finish(folder: Path) -> None:
        write_card(folders.run, folder, merged=not (folder / "adapter_config.json").is_file())

    edited = edits.run(name, folders.run, folders.output, *chosen, finish=finish)
    for line in edited.report():
        print(line)
    print(f"card      {folders.output}/README.md")
