"""The command `sails view`: a page to browse the responses and verdicts of an evaluation, or of two side by side.

sails view runs/eval-safety-testbed            writes runs/eval-safety-testbed/view.html
sails view runs/first runs/second              the same prompts side by side, what changed first
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.options import option

VIEW_FILE = "view.html"


@dataclass(frozen=True)
class ViewArguments:
    """Page."""

    run: Path = field(
        metadata={
            "help": "Output folder of an evaluation (with --compare, both models are shown), of an attack that was "
            "judged, or of a training on the testbed.",
            "positional": True,
        }
    )
    run2: Path | None = option(None, "Another one, with the same prompts, to compare with it.", positional=True)
    output: Path | None = option(None, f"HTML file to write; default: {VIEW_FILE} in the folder RUN.")
    features: Path | None = option(
        None,
        "A finished run of --init sails: show for each prompt which features of its subspace are active at the end, in "
        "the base model.",
    )
    progress: bool = option(True, "Show a progress bar.")

    def __post_init__(self) -> None:
        if self.output is not None and self.output.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"output is {self.output}; name a file that ends in .html")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> Path:
    """Write the page, and print where it is. Returns the file."""
    (args,) = CommandLine.read(argv).parse([ViewArguments], prog=prog)
    from sails_align.core.log import show
    from sails_align.reporting.viewer.page import write_view
    from sails_align.reporting.viewer.runs import read_runs, run_with_features

    runs = read_runs(args.run, args.run2)
    features = None
    if args.features is not None:
        from sails_align.training.features import active_features

        requests = [list(prompt.messages) for prompt in runs[0].prompts]
        features = active_features(args.features, requests, progress=args.progress)
    path = args.output or args.run / VIEW_FILE
    title = f"Responses of {args.run}" if args.run2 is None else f"Responses of {args.run} and {args.run2}"
    for note in write_view(runs, title, path, features):
        show(note)
    show(f"view      {path}")
    if args.features is None and (of := run_with_features(args.run)) is not None:
        show(f"features  add --features {of} to show which SAE features are active on each prompt")
    return path
