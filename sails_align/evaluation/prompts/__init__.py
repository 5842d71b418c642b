"""Prompts by name: known prompt sets (`sets`), files, and datasets on the hub, which `load` reads.

Prompts that are in no file, such as the testbed's, are made by the entries of `MAKERS`.
"""

from collections.abc import Sequence

from sails_align.core.registry import Registry
from sails_align.evaluation.records import Prompt
from sails_align.models import Resolver, resolver_of

MAKERS: Registry[Resolver] = Registry("maker of prompts", {})
"""Each is a function `make(name, n, *, part, seed)` of at most `n` prompts of each split; see `load.load_all`."""


def maker_of(name: str) -> Resolver | None:
    """Return the entry that makes the prompts of a name; None if they are to be loaded."""
    return resolver_of(name, MAKERS)


def is_of_testbed(prompts: Sequence[Prompt]) -> bool:
    """Tell whether all prompts, also those from a file, are the testbed's, which its oracle can judge."""
    return all("testbed" in prompt.meta for prompt in prompts)
