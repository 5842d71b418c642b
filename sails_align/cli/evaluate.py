"""The commands that evaluate, compare and report. Options are checked before what computes is imported."""

from collections.abc import Mapping, Sequence
from typing import Any

from sails_align.core.command_line import CommandLine
from sails_align.evaluation.attacks.parse import parse as parse_attack
from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.options import (
    ComparedArguments,
    DivergenceArguments,
    PromptArguments,
    ReferenceArguments,
    ResponseArguments,
    RunArguments,
    TrackerArguments,
)
from sails_align.experiments.options import KEYS, CompareOptions, LauncherOptions, ReportOptions
from sails_align.steering.options import SteeringOptions

Argv = Sequence[str] | None
JUDGED = (ResponseArguments, PromptArguments, JudgeArguments, RunArguments)


def safety(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any]:
    """Measure safety rate, harmfulness, over-refusal and attack success. Return the contents of `metrics.json`."""
    classes = (*JUDGED, ComparedArguments, TrackerArguments, SteeringOptions)
    how, asked, who, run, against, trackers, steering = CommandLine.read(argv).parse(classes, prog=prog)
    from sails_align.evaluation.run import run_evaluation

    options = {"compare": against.compare, "report_to": trackers.report_to}
    return run_evaluation("safety", how, asked, who, run, steering, **options)


def helpfulness(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any]:
    """Measure how helpful the responses of a model are. Return the contents of `metrics.json`."""
    classes = (*JUDGED, ReferenceArguments, ComparedArguments, TrackerArguments, SteeringOptions)
    how, asked, who, run, reference, against, trackers, steering = CommandLine.read(argv).parse(classes, prog=prog)
    from sails_align.evaluation.run import run_evaluation

    options = {"reference": reference.reference, "compare": against.compare, "report_to": trackers.report_to}
    return run_evaluation("helpfulness", how, asked, who, run, steering, **options)


def divergence(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any]:
    """Measure the KL divergence of a model from its base, on answers. Return the contents of `metrics.json`."""
    classes = (ResponseArguments, PromptArguments, RunArguments, DivergenceArguments, TrackerArguments)
    how, asked, run, against, trackers = CommandLine.read(argv).parse(classes, prog=prog)
    from sails_align.evaluation.divergence import run_divergence

    return run_divergence(how, asked, run, against, trackers.report_to)


def harness(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any]:
    """Measure capability with lm-eval-harness. Return the contents of `metrics.json`."""
    args, trackers = CommandLine.read(argv).parse([HarnessArguments, TrackerArguments], prog=prog)
    from sails_align.evaluation.harness.run import measure_capability

    return measure_capability(args, trackers.report_to)


def attack(argv: Sequence[str], prog: str | None = None) -> Mapping[str, Any] | None:
    """Attack harmful prompts by the method in `argv[0]`. Return the contents of `metrics.json`, if there is a judge."""
    args = parse_attack(argv, "sails attack")
    from sails_align.evaluation.attacks.run import run_attack

    return run_attack(args)


def compare(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any]:
    """Train and evaluate every method over seeds. Return the contents of `results.json`."""
    line = CommandLine.read(argv)
    options = {name: value for name, value in line.from_file.items() if name not in KEYS}
    CommandLine(line.options, line.path, options).parse([CompareOptions, LauncherOptions], prog=prog)
    from sails_align.cli.compare import main

    return main(argv, prog)


def report(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any]:
    """Write the report of a comparison again. Return the contents of `results.json`."""
    CommandLine.read(argv).parse([ReportOptions], prog=prog)
    from sails_align.cli.compare import report_main

    return report_main(argv, prog)
