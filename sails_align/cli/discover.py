"""The command `sails discover`: find the subspace that a training with the same options starts in, save and explain it.

sails discover                                       the testbed
sails discover --config FILE.yaml --output_dir DIR   anything else

DIR/subspace/       the subspace, for --subspace_path; a training with the same options in DIR uses it
DIR/discovered.json every chosen feature: the tokens that it promotes, and the texts in which it is most active
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.cli.train import check_options
from sails_align.core.errors import InputError
from sails_align.core.options import OutputOptions, check_least, option
from sails_align.core.text import counted
from sails_align.initializers import subspace_initializers

if TYPE_CHECKING:
    from sails_align.core.tables import FittedTable
    from sails_align.subspace.basis import Subspace

DISCOVERED = "discovered.json"
USERS = {"all": "", "readers": ", for modules that read", "writers": ", for modules that write"}


@dataclass(frozen=True)
class ShownOptions:
    """What is printed."""

    n_texts: int = option(256, "Number of harmful texts, and of harmless ones, to find top contexts in.")
    n_shown: int = option(5, f"Number of features of a layer to print; {DISCOVERED} has all.")

    def __post_init__(self) -> None:
        check_least(self, n_texts=1, n_shown=0)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Find the safety subspace, save it and show it."""
    (shown,) = check_options("sft", argv, prog, ShownOptions)
    from sails_align.core.artifacts import tensors_hash
    from sails_align.core.command_line import CommandLine
    from sails_align.core.earlier import check_earlier, write_record
    from sails_align.core.files import output_folder, write_json
    from sails_align.core.log import LOG_FILE, Stages, log_file, say, show
    from sails_align.training.features import explain_subspace
    from sails_align.training.run import load_source, parse, resolved
    from sails_align.training.stages import data_line, model_line, say_data, subspace_line
    from sails_align.training.subspace import find_subspace

    args = parse("sft", CommandLine.read(argv).without([ShownOptions]), prog)
    if not args.sails.uses_subspace:
        raise InputError(f"{args.start} starts in no subspace; choose --init {', '.join(subspace_initializers())}")
    folder = Path(str(args.training.output_dir))
    opened, stages = log_file(folder, "sails discover"), Stages(("model", "data", "subspace"))
    with output_folder(folder) as output_dir, opened, stages:
        say(f"the safety subspace; output: {output_dir}/ (all lines: {LOG_FILE})")
        stages.begin("model", model_line(args))
        args, testbed = resolved(args)
        stages.begin("data", data_line(args))
        source = load_source(args, testbed)
        say_data(source)
        stages.begin("subspace", subspace_line(args))
        subspace = find_subspace(args, source, output_dir / "subspace")
        features = []
        if "features" in subspace.provenance and args.sails.saes().named:
            identity = {
                "command": "sails discover",
                "options": {"n_texts": shown.n_texts},
                "subspace": tensors_hash(subspace.tensors()),
            }
            check_earlier(output_dir, identity, DISCOVERED, overwrite=args.of(OutputOptions).overwrite_output_dir)
            features = explain_subspace(args, source, subspace, shown.n_texts)
            write_json(output_dir / DISCOVERED, features)
            write_record(output_dir, identity)
    saved = output_dir / "subspace" if args.sails.subspace_path is None else args.sails.subspace_path
    show(*tables_of(subspace, features, shown.n_shown), f"subspace  {saved}/")
    if features:
        show(f"features  {output_dir / DISCOVERED}")


def tables_of(subspace: "Subspace", features: Sequence[dict[str, Any]], n_shown: int) -> "list[FittedTable | str]":
    """Return a table for each layer (and kind of modules), or a line if there are no features."""
    about, tables = subspace.provenance, []
    for used_by in dict.fromkeys(feature["used_by"] for feature in features) or ["all"]:
        bases, kept = subspace.bases, about.get("layers", {})
        if used_by == "writers" and subspace.writers is not None:
            bases, kept = subspace.writers, about["writers"]["layers"]
        for layer, basis_DR in bases.items():
            of_layer = [of for of in features if (of["layer"], of["used_by"]) == (layer, used_by)]
            if of_layer:
                share = kept[str(layer)]["variance_kept"]
                found = f"{counted(len(of_layer), 'feature')} -> {counted(basis_DR.shape[1], 'PCA direction')}"
                title = f"layer {layer}: {found} ({share:.0%} of their variance){USERS[used_by]}"
                tables.append(_table(title, of_layer, n_shown))
            else:
                tables.append(f"layer {layer}: {counted(basis_DR.shape[1], 'direction')} ({about.get('method')})")
    return tables


def _table(title: str, features: Sequence[dict[str, Any]], n_shown: int) -> "FittedTable":
    from sails_align.core.tables import FittedTable

    more = len(features) - n_shown
    numbers = [name for name in ("effect", "delta") if name in features[0]]
    return FittedTable(
        title,
        ("feature", *numbers, "promotes", "most active at the token in brackets"),
        (_row(feature, numbers) for feature in features[:n_shown]),
        n_texts=3 + len(numbers),
        caption=f"and {more} more, in {DISCOVERED}" if more > 0 else None,
    )


def _row(feature: dict[str, Any], numbers: Sequence[str]) -> Sequence[str]:
    from sails_align.saes.explain import excerpt

    best = next((excerpt(of["tokens"], of["activations"]) for of in feature["contexts"]), "nowhere")
    promoted = " ".join(word.strip() for word in feature["promoted"])
    return str(feature["id"]), *(f"{feature[name]:+.3f}" for name in numbers), promoted, best
