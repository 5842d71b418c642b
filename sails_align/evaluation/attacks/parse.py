"""The command line of `sails attack`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.evaluation.attacks import ATTACKS
from sails_align.evaluation.attacks.options import GCG_TEXTS, TESTBED_BUDGET
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.options import PromptArguments, ResponseArguments, RunArguments, TrackerArguments
from sails_align.evaluation.prompts import maker_of


@dataclass(frozen=True)
class AttackArguments:
    """All options of `sails attack`."""

    method: str
    """A name in `ATTACKS`."""
    how: ResponseArguments
    asked: PromptArguments
    who: JudgeArguments
    run: RunArguments
    trackers: TrackerArguments
    attack: Any
    """The attack's own options."""


def parse(argv: Sequence[str], prog: str) -> AttackArguments:
    """Read the command line; raise `InputError` for an unknown attack or option, or a value that cannot be used."""
    if not argv or argv[0] not in ATTACKS:
        given = repr(argv[0]) if argv else "no attack"
        raise InputError(f"{given} is given, but the attacks are {', '.join(ATTACKS.names())}; try {prog} gcg --help")
    method, line = argv[0], CommandLine.read(argv[1:])
    common = [ResponseArguments, PromptArguments, JudgeArguments, RunArguments, TrackerArguments]
    classes = [*common, ATTACKS.get(method).options]
    texts = GCG_TEXTS if method == "gcg" else None
    args = AttackArguments(method, *line.parse(classes, prog=f"{prog} {method}", texts=texts))
    if method == "prefill" and args.how.backend == "openai":
        raise InputError(
            "backend is 'openai', but a server cannot be made to begin an answer with given words; use hf or vllm"
        )
    if method != "gcg":
        return args
    if all(map(maker_of, args.asked.prompts)):
        args = AttackArguments(method, *line.parse(classes, defaults=TESTBED_BUDGET, prog=f"{prog} {method}"))
    if args.how.backend != "hf":
        raise InputError(
            f"backend is {args.how.backend!r}, but a search needs gradients, which only hf has; leave it out"
        )
    return args
