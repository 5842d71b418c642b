"""The command `sails testbed build`: build a testbed from scratch, in minutes on two cores."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sails_align.core.command_line import CommandLine
from sails_align.core.options import option
from sails_align.testbed.world import WorldConfig


@dataclass(frozen=True)
class TestbedOptions:
    """Testbed."""

    output: Path = field(metadata={"help": "Output folder."})
    seed: int = option(WorldConfig.seed, "Seed of the world, the model and the SAEs.")
    shared_harm: float = option(
        WorldConfig.shared_harm, "Share of harmful consequences told in words that all harm categories share, 0 to 1."
    )
    n_trained_categories: int = option(
        WorldConfig.n_trained_categories, "Harm categories in the alignment data, of 14; two more are for validation."
    )
    d_model: int = option(WorldConfig.d_model, "Width of the base model.")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Build a testbed and print the quality of its SAEs."""
    (options,) = CommandLine.read(argv).parse([TestbedOptions], prog=prog)
    parameters = asdict(options)
    output = parameters.pop("output")
    world = WorldConfig(**parameters)
    from sails_align.core.log import LOG_FILE, say, show
    from sails_align.core.tables import FittedTable
    from sails_align.testbed.build import build_testbed

    say(f"building the testbed of seed {options.seed}; output: {output}/ (all lines: {LOG_FILE})")
    report = build_testbed(output, world)
    title = f"Testbed of seed {options.seed}: {report['n_parameters']:,} parameters"
    table = FittedTable(title, ("SAE of layer", "explained variance", "L0", "dead latents"))
    for layer, sae in report["saes"].items():
        table.add_row(layer, f"{sae['explained_variance']:.3f}", f"{sae['l0']:.1f}", f"{sae['dead_fraction']:.1%}")
    show(table, f"testbed   {output}/  (--model_name_or_path {output})")
