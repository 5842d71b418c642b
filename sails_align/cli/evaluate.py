"""The commands `sails eval safety`, `sails eval helpfulness` and `sails attack`."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any


def safety(argv: Sequence[str] | None = None, prog: str | None = None) -> Mapping[str, Any]:
    """Measure safety rate, harmfulness, over-refusal and attack success. Returns what is in `metrics.json`."""
    from sails_align.evaluation.safety import main

    return main(argv, prog)


def helpfulness(argv: Sequence[str] | None = None, prog: str | None = None) -> Mapping[str, Any]:
    """Measure how good a model's answers are. Returns what is in `metrics.json`."""
    from sails_align.evaluation.helpfulness import main

    return main(argv, prog)


def attack_gcg(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any] | None:
    """Search for adversarial suffixes, and try them. Returns what is in `metrics.json`, if there is a judge."""
    return _attack("gcg", argv)


def attack_transfer(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any] | None:
    """Try suffixes on other prompts and models. Returns what is in `metrics.json`, if there is a judge."""
    return _attack("transfer", argv)


def attack_wrappers(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any] | None:
    """Try known jailbreak wrappers around prompts. Returns what is in `metrics.json`, if there is a judge."""
    return _attack("wrappers", argv)


def _attack(method: str, argv: Sequence[str] | None) -> dict[str, Any] | None:
    from sails_align.cli.attack import main

    return main([method, *(sys.argv[1:] if argv is None else argv)])
