"""The command `sails features`: what the features of a finished run's subspace mean, and what training did to them.

sails features --run runs/mine

It prints a table, and writes all of it to features.json in the run's folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.core.command_line import CommandLine
from sails_align.core.options import check_least, option

if TYPE_CHECKING:
    from sails_align.core.tables import FittedTable

N_PRINTED = 4
"""Features of a layer that are printed; the file has all."""
SIDES = ("harmful", "harmless")


@dataclass(frozen=True)
class FeaturesArguments:
    """The run."""

    run: str = option("runs/sft-sails-testbed", "A finished run of --init sails.")
    n_texts: int = option(256, "Number of harmful texts, and of harmless ones, to read.")

    def __post_init__(self) -> None:
        check_least(self, n_texts=1)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Explain the features of a run and print them. Returns what is in `features.json`."""
    (args,) = CommandLine.read(argv).parse([FeaturesArguments], prog=prog)
    from sails_align.core.log import show
    from sails_align.training.features import FEATURES_FILE, explain

    found = explain(Path(args.run), args.n_texts)
    show(table_of(found), f"features  {Path(args.run) / FEATURES_FILE}")
    return found


def table_of(found: Mapping[str, Any]) -> "FittedTable":
    """Return the features with their words and activations."""
    from sails_align.core.tables import FittedTable
    from sails_align.saes.explain import excerpt

    table = FittedTable(
        "meaning of the features (activations at the end of requests, before -> after training)",
        ("layer, feature", "promotes", "most active at the token in brackets", "on harmful", "on harmless"),
        n_texts=3,
    )
    told = {(meaning["layer"], meaning["id"]): meaning for meaning in found["meanings"]}
    for layer, of in found["layers"].items():
        for feature in of["features"][:N_PRINTED]:
            meaning = told[int(layer), feature["id"]]
            promoted = " ".join(word.strip() for word in meaning["promoted"])
            best = next((excerpt(of["tokens"], of["activations"]) for of in meaning["contexts"]), "nowhere")
            changes = [f"{feature[f'{side}_before']:.2f} -> {feature[f'{side}_after']:.2f}" for side in SIDES]
            table.add_row(f"{layer}, {feature['id']}", promoted, best, *changes)
    return table
