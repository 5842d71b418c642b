"""The command `sails edit`: edit trained weights, into a new folder. `sails merge` is short for `sails edit merge`.

sails edit merge runs/mine --output runs/mine-merged
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sails_align import edits
from sails_align.core.command_line import CommandLine
from sails_align.core.files import set_aside
from sails_align.core.options import OVERWRITE, all_but, option
from sails_align.edits.options import MODELS


@dataclass(frozen=True)
class EditFolders:
    """The finished run, and the edited model."""

    run: Path = field(
        metadata={"help": "Folder of a finished run, or any folder with a LoRA adapter.", "positional": True}
    )
    output: Path = field(metadata={"help": "The folder to make."})
    overwrite_output_dir: bool = option(False, OVERWRITE)


def _folders_of(options: Any) -> Iterator[tuple[str, Path]]:
    """Yield the options that name a model which is a local folder, with that folder."""
    for name in MODELS:
        value = getattr(options, name, None)
        if value is not None and Path(value).is_dir():
            yield name, Path(value)


def main(argv: Sequence[str], prog: str | None = None) -> None:
    """Run the edit that the first argument names, write a model card, and print what the edit reports."""
    name, *options = argv
    entry = edits.EDITS.get(name)
    classes = [EditFolders] if entry.options is None else [EditFolders, entry.options]
    folders, *chosen = CommandLine.read(options).parse(classes, prog=prog)
    from sails_align.core.earlier import RECORD_FILE, check_earlier, write_record
    from sails_align.export.card import WeightEdit, write_card
    from sails_align.export.card_facts import public_name
    from sails_align.models.contents import content_of

    output, overwrite = folders.output, folders.overwrite_output_dir
    identity = {
        "command": f"sails edit {name}",
        "options": all_but(("device",), *chosen),
        "run": content_of(folders.run) if folders.run.is_dir() else None,
        **{name: content_of(folder) for of in chosen for name, folder in _folders_of(of)},
    }
    is_ours = (output / RECORD_FILE).is_file()  # what else lies there is never replaced
    if is_ours and check_earlier(output, identity, RECORD_FILE, overwrite=overwrite, option="--output"):
        print(f"{output} holds this result: nothing is done")
        return

    def public(name: str, value: Any) -> Any:
        return public_name(value) if name in MODELS else value

    def finish(folder: Path) -> None:
        options = {name: public(name, value) for name, value in identity["options"].items()}
        told = None if name == "merge" else WeightEdit(name, entry.summary, options)
        write_card(folders.run, folder, merged=not (folder / "adapter_config.json").is_file(), edit=told)
        write_record(folder, identity)

    with set_aside(output) if is_ours else nullcontext():
        edited = edits.run(name, folders.run, output, *chosen, finish=finish)
    for line in edited.report():
        print(line)
    print(f"card      {output}/README.md")
