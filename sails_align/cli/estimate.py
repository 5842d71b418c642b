"""The command `sails estimate`: estimate the memory of a training, before it is started.

sails estimate --config recipes/configs/gemma-2-9b/dpo_full.yaml --num_gpus 8

It takes the options of the training (sails train sft --help) and estimates every configuration in accelerate_configs/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sails_align.cli.train import check_options
from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.options import check_choices, option
from sails_align.subspace.options import Method
from sails_align.training.options import Gpus

METHODS: tuple[Method, ...] = ("sft", "dpo")


@dataclass(frozen=True)
class EstimateOptions:
    """Estimate."""

    method: str | None = option(None, "sft or dpo. Default: as the name of the --config file begins.", choices=METHODS)
    output: Path | None = option(None, "A JSON file for the figures, in bytes.")

    def __post_init__(self) -> None:
        check_choices(self, {"method": METHODS})


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Print the estimate. Returns what `--output` holds."""
    line = CommandLine.read(argv)
    method = method_of(line)
    options, gpus = check_options(method or "sft", argv, prog, EstimateOptions, Gpus)
    if method is None:
        why = f"the name {Path(line.path).name} begins with neither sft_ nor dpo_" if line.path else "no --config"
        raise InputError(f"cannot infer the method ({why}); pass --method sft or --method dpo")
    from sails_align.training.estimate import estimate_training, show

    result = estimate_training(method, line.without([EstimateOptions, Gpus]), gpus)
    if options.output is not None:
        from sails_align.core.files import write_json

        write_json(options.output, result)
    show(result)
    return result


def method_of(line: CommandLine) -> Method | None:
    """Return the method that is given, or that the file's name begins with."""
    given = line.value("method") or (Path(line.path).name.partition("_")[0] if line.path else None)
    return next((method for method in METHODS if method == given), None)
