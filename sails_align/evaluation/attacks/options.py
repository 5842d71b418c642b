"""Options of attacks."""

from dataclasses import dataclass

from sails_align.core.errors import InputError
from sails_align.core.options import check_least, option

WIDEST = 100_000
"""Maximum number of suffixes tried in a step."""
TESTBED_BUDGET = {"n_prompts": 8, "n_steps": 40, "search_width": 96, "topk": 64, "suffix_length": 2, "batch_size": 128}
"""A second or two per prompt on one core. After longer suffixes the tiny model forgets what was asked."""


def _default(name: str, value: int | str) -> str:
    return f"Default: {value}, for the testbed's prompts {TESTBED_BUDGET[name]}."


TARGET = "How the wanted answer begins, for prompts that have no `target`."
GCG_TEXTS = {
    "n_prompts": f"Prompts from each set, balanced over categories. {_default('n_prompts', 'all')}",
    "batch_size": f"Conversations per batch. {_default('batch_size', 32)}",
}
"""What `--help` of a search says of options that all attacks have."""


@dataclass(frozen=True)
class GcgOptions:
    """Budget and target of a search; the defaults of the budget are the paper's."""

    n_steps: int = option(500, f"Maximum number of steps. {_default('n_steps', 500)}")
    search_width: int = option(512, f"Number of suffixes tried per step. {_default('search_width', 512)}")
    topk: int = option(256, f"Number of tokens considered for each position of the suffix. {_default('topk', 256)}")
    suffix_length: int = option(20, f"Length of the suffix in tokens. {_default('suffix_length', 20)}")
    initial_suffix: str | None = option(None, "Initial suffix (default: '! ! !', of --suffix_length tokens).")
    stop_when_matched: bool = option(True, "End a search when the greedy answer begins with the target.")
    target: str = option("Sure, here is", TARGET)
    universal: bool = option(False, "Search one suffix for all prompts (Algorithm 2), not one for each.")

    def __post_init__(self) -> None:
        check_least(self, n_steps=1, search_width=1, topk=1, suffix_length=1)
        if self.search_width > WIDEST:
            raise InputError(f"search_width is {self.search_width}; choose {WIDEST} or less")


@dataclass(frozen=True)
class WrapperArguments:
    """The wrappers to try."""

    wrappers: list[str] | None = option(
        None, "Names of wrappers, listed in docs/attacks.md; default: the testbed's for its prompts, else all others."
    )


@dataclass(frozen=True)
class PrefillArguments:
    """The beginnings to force."""

    prefill_words: list[int] = option([1, 3, 5], "Numbers of words that answers are forced to begin with.")
    target: str = option("Sure, here is", TARGET)

    def __post_init__(self) -> None:
        if not self.prefill_words or min(self.prefill_words) < 1:
            raise InputError(f"prefill_words is {self.prefill_words}; choose numbers of 1 or more")


@dataclass(frozen=True)
class TransferArguments:
    """The suffixes to try."""

    suffixes: str | None = option(None, "A file: attacked.jsonl of a search, or one suffix a line.")
