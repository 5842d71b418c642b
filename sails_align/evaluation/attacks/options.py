"""The options of attacks: which one, with what budget."""

from dataclasses import dataclass

from sails_align.core.errors import InputError
from sails_align.core.options import check_least, option

WIDEST = 100_000
"""Suffixes tried in a step, at most."""
TESTBED_BUDGET = {"n_prompts": 8, "n_steps": 40, "search_width": 96, "topk": 64, "suffix_length": 2, "batch_size": 128}
"""A second or two a prompt on one core. After longer suffixes the tiny model answers, but forgets what was asked."""


@dataclass(frozen=True)
class GcgOptions:
    """The budget of a search; the defaults are the paper's."""

    n_steps: int = option(500, "Steps of the search, at most.")
    search_width: int = option(512, "Suffixes tried in a step.")
    topk: int = option(256, "Tokens considered for each position of the suffix.")
    suffix_length: int = option(20, "Tokens of the suffix.")
    initial_suffix: str | None = option(
        None, "What the search starts from (default: '! ! !', of --suffix_length tokens)."
    )
    stop_when_matched: bool = option(True, "End a search when the greedy answer begins with the target.")

    def __post_init__(self) -> None:
        check_least(self, n_steps=1, search_width=1, topk=1, suffix_length=1)
        if self.search_width > WIDEST:
            raise InputError(f"search_width is {self.search_width}; choose {WIDEST} or less")


@dataclass(frozen=True)
class GcgArguments(GcgOptions):
    """Which searches are made."""

    target: str = option("Sure, here is", "How the wanted answer begins, for prompts that have no `target`.")
    universal: bool = option(False, "One suffix for all prompts (Algorithm 2), not one for each.")


@dataclass(frozen=True)
class WrapperArguments:
    """Which wrappers are tried."""

    wrappers: list[str] | None = option(
        None, "Names of wrappers (docs/attacks.md lists them). Default: the testbed's for its prompts, else all others."
    )


@dataclass(frozen=True)
class TransferArguments:
    """Which suffixes are tried."""

    suffixes: str | None = option(None, "A file: attacked.jsonl of a search, or one suffix a line.")
