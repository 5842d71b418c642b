"""The commands `sails discover` and `sails testbed build`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sails_align.core.errors import CommandParser, InputError
from sails_align.initializers import subspace_initializers
from sails_align.testbed.build import PARAMETERS, build_testbed
from sails_align.testbed.world import WorldConfig

SHOWN_FEATURES = 10
"""Features of a layer that are printed; all of them are in the artifact."""


PARAMETERS_HELP = {
    "seed": "of the world, the model and the SAEs",
    "shared_harm": "share of harmful consequences told in words that all harm categories share, 0 to 1",
    "n_trained_categories": "harm categories in the alignment data, of 14; two more are for validation",
    "d_model": "width of the base model",
}


def discover(argv: Sequence[str]) -> None:
    """`sails discover`: find the subspace that `sails train sft` with the same options starts in, save it and show it.

    Raises:
        InputError: as `align.parse`, `align.load_source` and `find_subspace`.
    """
    from sails_align.core.artifacts import output_folder
    from sails_align.training import run as align
    from sails_align.training.subspace import find_subspace

    args = align.parse("sft", argv, prog="sails discover")
    if not args.sails.uses_subspace:
        raise InputError(f"{args.start} starts in no subspace; choose --init {', '.join(subspace_initializers())}")
    with output_folder(Path(str(args.training.output_dir))) as output_dir:
        args, testbed = align.resolved(args)
        source = align.load_source(args, testbed)
        subspace = find_subspace(args, source, output_dir / "subspace")
    console = Console()
    for layer, basis_DR in subspace.bases.items():
        console.print(layer_table(layer, basis_DR.shape[1], subspace.provenance), highlight=False)
    saved = output_dir / "subspace" if args.sails.subspace_path is None else args.sails.subspace_path
    console.print(f"subspace  {saved}/", highlight=False)


def layer_table(layer: int, n_directions: int, provenance: dict[str, Any]) -> Table | str:
    """The best features of a layer, if the subspace was made of features, and how many directions it has there."""
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


def build(argv: Sequence[str]) -> None:
    """`sails testbed build`.

    Raises:
        InputError: if an option cannot be used or the folder cannot be written.
    """
    parser = CommandParser(
        prog="sails testbed build", description="Make a testbed from scratch, in minutes on two cores."
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    for name, words in PARAMETERS_HELP.items():
        default = getattr(WorldConfig, name)
        parser.add_argument(f"--{name}", type=PARAMETERS[name], default=default, help=f"{words} (default {default})")
    options = parser.parse_args(argv)
    report = build_testbed(options.output, WorldConfig(**{name: getattr(options, name) for name in PARAMETERS}))
    table = Table(title=f"Testbed of seed {options.seed}: {report['n_parameters']:,} parameters")
    for heading in ("SAE of layer", "explained variance", "L0", "dead latents"):
        table.add_column(heading, justify="right")
    for layer, sae in report["saes"].items():
        table.add_row(layer, f"{sae['explained_variance']:.3f}", f"{sae['l0']:.1f}", f"{sae['dead_fraction']:.1%}")
    console = Console()
    console.print(table)
    console.print(f"testbed   {options.output}/  (--model_name_or_path {options.output})", highlight=False)
