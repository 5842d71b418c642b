"""What models are asked: prompt sets by name (`sets`), files and data sets of the hub, all loaded by `load`.

Prompts that are in no file, such as the testbed's, are made by what is registered in `MAKERS`.
"""

from collections.abc import Sequence
from typing import Protocol

from sails_align.core.registry import Entry, Registry
from sails_align.evaluation.records import Prompt

MAKERS = Registry("maker of prompts", {})


class PromptMaker(Protocol):
    """Makes prompts of a name."""

    def owns(self, name: str) -> bool:
        """Whether a name is one of its sets."""
        ...

    def make(self, name: str, n: int | None, *, part: str, seed: int) -> list[Prompt]:
        """Make prompts: at most `n` of each of its splits, of a part (`test` or `validation`), chosen by a seed."""
        ...


def maker_of(name: str) -> PromptMaker | None:
    """Find what makes the prompts of a name; None: they are to be loaded."""
    makers = (entry.load() for _, entry in MAKERS.items())
    return next((maker for maker in makers if maker.owns(name)), None)


def is_of_testbed(prompts: Sequence[Prompt]) -> bool:
    """Whether all prompts are the testbed's, which its oracle can judge: also where they come from a file."""
    return all("testbed" in prompt.meta for prompt in prompts)


__all__ = ["MAKERS", "Entry", "PromptMaker", "is_of_testbed", "maker_of"]
