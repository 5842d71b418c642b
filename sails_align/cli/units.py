"""The command `sails units`: find which channels of a model matter for safety, and which for utility.

sails units --adapter_path RUN                       the testbed, with a trained adapter
sails units --config FILE.yaml --output_dir DIR      anything else

DIR/units/units.safetensors   the scores of all units on both kinds of data, and the set of each
DIR/units/units.json          how they were found, the sizes of the sets, and how stable these are
"""

from collections.abc import Sequence
from pathlib import Path

from sails_align.cli.train import check_options
from sails_align.core.options import OutputOptions
from sails_align.units.options import UnitOptions

NAMES = {"scu": "safety-critical", "ucu": "utility-critical", "ru": "redundant", "cu": "complex"}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Find the units, save them and show how many there are."""
    (options,) = check_options("sft", argv, prog, UnitOptions)
    from sails_align.core.command_line import CommandLine
    from sails_align.core.files import output_folder
    from sails_align.core.log import LOG_FILE, Stages, log_file, say, show
    from sails_align.core.tables import FittedTable
    from sails_align.training.run import load_source, parse, resolved
    from sails_align.training.stages import data_line, model_line, say_data
    from sails_align.training.units import units_of

    args = parse("sft", CommandLine.read(argv).without([UnitOptions]), prog)
    folder = Path(str(args.training.output_dir))
    opened, stages = log_file(folder, "sails units"), Stages(("model", "data", "units"))
    with output_folder(folder) as output_dir, opened, stages:
        say(f"units for safety and for utility; output: {output_dir}/ (all lines: {LOG_FILE})")
        stages.begin("model", model_line(args))
        args, testbed = resolved(args)
        stages.begin("data", data_line(args))
        source = load_source(args, testbed)
        say_data(source)
        stages.begin("units", f"at most {options.calibration_examples:,} conversations of each kind")
        overwrite = args.of(OutputOptions).overwrite_output_dir
        units = units_of(args, source, options, output_dir / "units", overwrite)
    about = units.provenance
    table = FittedTable(f"{len(units):,} units", ("", "units", "share", "found again in the other half", "by chance"))
    for name, count in about["sets"].items():
        again = about["overlap"][name]
        shown = "-" if again is None else f"{again:.0%}"
        table.add_row(
            f"{name} ({NAMES[name]})",
            f"{count:,}",
            f"{count / len(units):.1%}",
            shown,
            f"{about['by_chance'][name]:.0%}",
        )
    show(table, f"units     {output_dir / 'units'}/")
