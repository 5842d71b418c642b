"""The command `sails edit`: edit trained weights, into a new folder. `sails merge` is short for `sails edit merge`.

sails edit merge runs/mine --output runs/mine-merged
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sails_align import edits
from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.files import set_aside
from sails_align.core.options import OVERWRITE, all_but, option
from sails_align.edits.options import DATASETS, MODELS


@dataclass(frozen=True)
class EditFolders:
    """The model, and the folder to make."""

    run: Path = field(
        metadata={
            "help": "Folder of a finished run, of any LoRA adapter or of a model; or a model's name, such as testbed.",
            "positional": True,
        }
    )
    output: Path = field(metadata={"help": "The folder to make."})
    overwrite_output_dir: bool = option(False, OVERWRITE)


def _contents_of(options: Any) -> Iterator[tuple[str, Any]]:
    """Yield the options that name a model, or data in a local file or folder, with its content."""
    from sails_align.models.contents import content_of

    for name in (*MODELS, *DATASETS):
        value = getattr(options, name, None)
        if value is not None and (name in MODELS or Path(value).exists()):
            yield name, _model_content(value) if name in MODELS else content_of(Path(value))


def _model_content(name: str) -> Any:
    """Return what changes whenever a model does: a folder's, or that of a name such as testbed or a hub id.

    None of a model that is not there; the edit says so.
    """
    from sails_align.models.contents import content_of
    from sails_align.models.resolve import resolve_model

    if Path(name).is_dir():
        return content_of(Path(name))
    with suppress(InputError):
        return dict(resolve_model(name).identity)
    return None


def main(argv: Sequence[str], prog: str | None = None) -> None:
    """Run the edit that the first argument names, write a model card, and print what the edit reports."""
    name, *options = argv
    entry = edits.EDITS.get(name)
    classes = [EditFolders] if entry.options is None else [EditFolders, entry.options]
    folders, *chosen = CommandLine.read(options).parse(classes, prog=prog)
    from sails_align.core.earlier import RECORD_FILE, check_earlier, write_record
    from sails_align.export.card import write_card
    from sails_align.models.spec import model_path

    output, overwrite = folders.output, folders.overwrite_output_dir
    identity = {
        "command": f"sails edit {name}",
        "options": all_but(("device",), *chosen),
        "run": _model_content(str(folders.run)),
        **{name: content for of in chosen for name, content in _contents_of(of)},
    }
    is_ours = (output / RECORD_FILE).is_file()  # what else lies there is never replaced
    if is_ours and check_earlier(output, identity, RECORD_FILE, overwrite=overwrite, option="--output"):
        print(f"{output} holds this result: nothing is done")
        return

    def finish(folder: Path) -> None:
        run = Path(model_path(str(folders.run)))  # of a model on the hub there is no folder
        merged = not (folder / "adapter_config.json").is_file()
        write_card(run if run.is_dir() else folder, folder, merged=merged, base_model=str(folders.run))
        write_record(folder, identity)

    with set_aside(output) if is_ours else nullcontext():
        edited = edits.run(name, folders.run, output, *chosen, finish=finish)
    for line in edited.report():
        print(line)
    print(f"card      {output}/README.md")
