"""The commands that evaluate, compare and report. Options are checked here, before what computes is imported."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sails_align.core.command_line import CommandLine
from sails_align.evaluation.attacks.parse import parse as parse_attack
from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.judges.options import JudgeArguments, LabelArguments
from sails_align.evaluation.options import PromptArguments, ReferenceArguments, ResponseArguments, RunArguments
from sails_align.experiments.options import CompareOptions, LauncherOptions, ReportOptions
from sails_align.experiments.protocol import KEYS
from sails_align.steering.options import SteeringOptions

Argv = Sequence[str] | None
JUDGED = (ResponseArguments, PromptArguments, JudgeArguments, RunArguments)


def safety(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any]:
    """Measure safety rate, harmfulness, over-refusal and attack success. Returns what is in `metrics.json`."""
    return _run("evaluation.safety", (*JUDGED, SteeringOptions), argv, prog)


def helpfulness(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any]:
    """Measure how good a model's answers are. Returns what is in `metrics.json`."""
    return _run("evaluation.helpfulness", (*JUDGED, ReferenceArguments, SteeringOptions), argv, prog)


def harness(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any]:
    """Measure capability with lm-eval-harness. Returns what is in `metrics.json`."""
    return _run("cli.eval_harness", (HarnessArguments,), argv, prog)


def judge_check(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any]:
    """Compare a judge's verdicts with labels. Returns what is in `metrics.json`."""
    return _run("cli.judge_check", (LabelArguments, JudgeArguments, RunArguments), argv, prog)


def attack_gcg(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any] | None:
    """Search for adversarial suffixes, and try them. Returns what is in `metrics.json`, if there is a judge."""
    return _attack("gcg", argv)


def attack_transfer(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any] | None:
    """Try suffixes on other prompts and models. Returns what is in `metrics.json`, if there is a judge."""
    return _attack("transfer", argv)


def attack_wrappers(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any] | None:
    """Try known jailbreak wrappers around prompts. Returns what is in `metrics.json`, if there is a judge."""
    return _attack("wrappers", argv)


def compare(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any]:
    """Train and evaluate every method over seeds. Returns what is in `results.json`."""
    line = CommandLine.read(argv)
    options = {name: value for name, value in line.from_file.items() if name not in KEYS}
    CommandLine(line.options, line.path, options).parse([CompareOptions, LauncherOptions], prog=prog)
    from sails_align.cli.compare import main

    return main(argv, prog)


def report(argv: Argv = None, prog: str | None = None) -> Mapping[str, Any]:
    """Make the report of a comparison again. Returns what is in `results.json`."""
    CommandLine.read(argv).parse([ReportOptions], prog=prog)
    from sails_align.cli.compare import report_main

    return report_main(argv, prog)


def _run(module: str, classes: Sequence[type], argv: Argv, prog: str | None) -> Any:
    """Check the options, and call the `main` of a module, which is imported for it."""
    CommandLine.read(argv).parse(classes, prog=prog)
    return importlib.import_module(f"sails_align.{module}").main(argv, prog)


def _attack(method: str, argv: Argv) -> Mapping[str, Any] | None:
    words = [method, *(sys.argv[1:] if argv is None else argv)]
    parse_attack(words, "sails attack")
    from sails_align.cli.attack import main

    return main(words)
