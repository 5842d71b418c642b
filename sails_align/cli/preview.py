"""The command `sails preview`: see what a training trains on, before it is started.

sails preview --config recipes/configs/gemma-2-9b/dpo_sails.yaml

It takes the options of the training (sails train sft --help), loads its data and tokenizer, and prints some examples
with their roles, the tokens that are trained on, and those that `--max_length` cuts off. The model is not loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from sails_align.cli.estimate import METHODS, method_of
from sails_align.cli.train import TRAINER_OPTIONS, check_options
from sails_align.core.command_line import CommandLine
from sails_align.core.options import check_choices, check_least, option
from sails_align.subspace.options import DPOOptions, Method


@dataclass(frozen=True)
class PreviewOptions:
    """Preview."""

    method: str | None = option(
        None,
        "sft or dpo. Default: as the name of the --config file begins; else dpo if an option is only for DPO, or sft.",
        choices=METHODS,
    )
    n_examples: int = option(3, "Number of training examples.")
    longest: bool = option(False, "Show the longest examples in place of the first ones.")

    def __post_init__(self) -> None:
        check_choices(self, {"method": METHODS})
        check_least(self, n_examples=1)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Print training examples."""
    line = CommandLine.read(argv)
    method = _method(line)
    (options,) = check_options(method, argv, prog, PreviewOptions)
    from datasets import disable_progress_bars

    from sails_align.training.preview import preview

    disable_progress_bars()  # a few rows are read again and again
    preview(method, line.without([PreviewOptions]), options.n_examples, longest=options.longest)


def _method(line: CommandLine) -> Method:
    only_dpo = {field.name for field in fields(DPOOptions)} | (
        set(TRAINER_OPTIONS["dpo"].names()) - set(TRAINER_OPTIONS["sft"].names())
    )
    has_dpo = any(line.value(name) is not None for name in only_dpo - {"chat_template_path"})
    return method_of(line) or ("dpo" if has_dpo else "sft")
