"""The command `sails discover`: find the subspace that a training with the same options starts in, save and show it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.cli.train import check_options
from sails_align.core.errors import InputError
from sails_align.initializers import subspace_initializers

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_FEATURES = 10
"""Features of a layer that are printed; all of them are in the artifact."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Find the safety subspace, save it and show it.

    Raises:
        InputError: as `training.run.parse`, `load_source` and `find_subspace`.
    """
    check_options("sft", argv, prog)
    from rich.console import Console

    from sails_align.core.files import output_folder
    from sails_align.core.log import LOG_FILE, Stages, log_file, say
    from sails_align.training.run import load_source, parse, resolved
    from sails_align.training.stages import data_line, model_line, say_data, subspace_line
    from sails_align.training.subspace import find_subspace

    args = parse("sft", argv, prog)
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
    console = Console()
    for layer, basis_DR in subspace.bases.items():
        console.print(layer_table(layer, basis_DR.shape[1], subspace.provenance), highlight=False)
    saved = output_dir / "subspace" if args.sails.subspace_path is None else args.sails.subspace_path
    console.print(f"subspace  {saved}/", highlight=False)


def layer_table(layer: int, n_directions: int, provenance: dict[str, Any]) -> "Table | str":
    """The best features of a layer, if the subspace was made of features, and how many directions it has there."""
    from rich.table import Table

    directions = f"direction{'' if n_directions == 1 else 's'}"
    if "features" not in provenance:
        return f"layer {layer}: {n_directions} {directions} ({provenance['method']})"
    features = provenance["features"]["layers"][str(layer)]
    n_kept = len(features["ids"])
    kept = provenance["layers"][str(layer)]["variance_kept"]
    table = Table(
        title=f"layer {layer}: {n_kept} features -> {n_directions} PCA {directions} ({kept:.0%} of their variance)"
    )
    for heading in ("feature", "delta", "score", "active, aligned", "active, unaligned"):
        table.add_column(heading, justify="right")
    names = ("ids", "delta", "score", "rate_aligned", "rate_unaligned")
    for feature, delta, score, *rates in list(zip(*(features[name] for name in names), strict=True))[:SHOWN_FEATURES]:
        table.add_row(str(feature), f"{delta:+.3f}", f"{score:.3f}", *(f"{rate:.1%}" for rate in rates))
    if n_kept > SHOWN_FEATURES:
        table.caption = f"and {n_kept - SHOWN_FEATURES} more, in subspace.json"
    return table
