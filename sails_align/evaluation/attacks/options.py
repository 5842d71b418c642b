"""The options of `sails attack`: which attack, with what budget, on which prompts; and who judges the responses."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.evaluation.attacks.wrappers import WRAPPERS, template
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.options import PromptArguments, ResponseArguments, RunArguments
from sails_align.testbed import lexicon
from sails_align.testbed.build import is_testbed

if TYPE_CHECKING:
    from sails_align.evaluation.attacks.gcg import GcgOptions

METHODS = ("gcg", "wrappers", "transfer")
# Part of the text the testbed's model was pretrained on; it knows few of the words of the others.
TESTBED_WRAPPERS = {
    f"testbed_{name}": template(text)
    for name, text in zip(("poet", "book", "teacher", "rules"), lexicon.WRAPPERS, strict=True)
}
TESTBED_BUDGET = {"n_prompts": 8, "n_steps": 40, "search_width": 96, "topk": 64, "suffix_length": 2, "batch_size": 128}
"""A second or two a prompt on one core. After longer suffixes the tiny model answers, but forgets what was asked."""


@dataclass
class GcgArguments:
    """Which searches are made."""

    target: str = field(
        default="Sure, here is", metadata={"help": "How the wanted answer begins, for prompts that have no `target`."}
    )
    universal: bool = field(
        default=False, metadata={"help": "One suffix for all prompts (Algorithm 2), not one for each."}
    )


@dataclass
class WrapperArguments:
    """Which wrappers are tried."""

    wrappers: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Of {', '.join((*WRAPPERS, *TESTBED_WRAPPERS))}. Default: the testbed's for its prompts, else all "
            "others."
        },
    )


@dataclass
class TransferArguments:
    """Which suffixes are tried."""

    suffixes: str | None = field(
        default=None, metadata={"help": "A file: attacked.jsonl of a search, or one suffix a line."}
    )


@dataclass
class Arguments:
    """All options of one run."""

    method: str
    """`gcg`, `wrappers` or `transfer`."""
    how: ResponseArguments
    asked: PromptArguments
    who: JudgeArguments
    run: RunArguments
    attack: GcgArguments | WrapperArguments | TransferArguments
    search: "GcgOptions | None" = None
    """The budget of `gcg`."""


def parse(argv: Sequence[str], prog: str) -> Arguments:
    """Read the command line.

    Raises:
        InputError: for an unknown attack or option, or a value that cannot be used.
    """
    if not argv or argv[0] not in METHODS:
        given = repr(argv[0]) if argv else "no attack"
        raise InputError(f"{given} is given, but the attacks are {', '.join(METHODS)}; try {prog} gcg --help")
    method, line = argv[0], CommandLine.read(argv[1:])
    common = [ResponseArguments, PromptArguments, JudgeArguments, RunArguments]
    prog = f"{prog} {method}"
    if method != "gcg":
        special = WrapperArguments if method == "wrappers" else TransferArguments
        return Arguments(method, *line.parse([*common, special], prog=prog))
    from sails_align.evaluation.attacks.gcg import GcgOptions

    classes = [*common, GcgArguments, GcgOptions]
    args = Arguments(method, *line.parse(classes, prog=prog))
    if all(is_testbed(name) for name in args.asked.prompts):
        args = Arguments(method, *line.parse(classes, defaults=TESTBED_BUDGET, prog=prog))
    if args.how.backend != "hf":
        raise InputError(
            f"backend is {args.how.backend!r}, but a search needs gradients, which only hf has; leave it out"
        )
    return args


def read_suffixes(path: Path) -> list[str]:
    """Suffixes of a file: `meta.suffix` or `suffix` of each line of JSON, or the lines of a text.

    Raises:
        InputError: if it cannot be read, or a line of JSON has no suffix.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix not in (".json", ".jsonl"):
            return [line.strip() for line in lines]
        rows = [json.loads(line) for line in lines]
        return [_text(row["suffix"] if "suffix" in row else row["meta"]["suffix"]) for row in rows]
    except OSError as error:
        raise InputError(f"cannot read the suffixes {path}: {error.strerror}; check the path") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is no file of suffixes ({type(error).__name__}: {error});\n"
            "give the attacked.jsonl of `sails attack gcg`, or a text with one suffix a line"
        ) from error


def _text(suffix: object) -> str:
    if not isinstance(suffix, str):
        raise TypeError(f"the suffix {suffix!r} is no text")
    suffix.encode()  # half surrogates cannot be sent
    return suffix
