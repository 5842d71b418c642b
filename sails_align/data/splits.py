"""Keep a prompt on one side: an example that is held out must not be trained on as well."""

import json
import logging
from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from sails_align.core.errors import InputError
from sails_align.data.messages import Message

logger = logging.getLogger(__name__)


def split_by_prompt(rows: Dataset, n_held_out: int, seed: int, name: str) -> tuple[Dataset, Dataset]:
    """Split normalized rows into training and held-out rows that have no prompt in common.

    Prompts are held out, with all their rows, up to `n_held_out` rows and a fifth of the prompts.
    Raises `InputError` if there are fewer than five rows, or only one prompt.
    """
    by_prompt: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_prompt.setdefault(_key(row), []).append(index)
    groups = list(by_prompt.values())
    if len(rows) < 5 or len(groups) < 2:
        few = f" with {len(groups)} different prompts" if len(groups) < len(rows) else ""
        raise InputError(
            f"{name} has {len(rows)} usable rows{few}; give at least 5 (with different prompts), so that some can be "
            "held out"
        )
    n_groups = min(n_held_out, max(1, len(groups) // 5))
    if len(groups) < len(rows):
        repeated = len(rows) - len(groups)
        logger.warning("%s: %d rows repeat a prompt; no prompt is both trained on and held out", name, repeated)
    parts = Dataset.from_dict({"group": groups}).train_test_split(test_size=n_groups, seed=seed)
    train, drawn = (list(parts[part]["group"]) for part in ("train", "test"))
    held_out: list[list[int]] = []
    kept: list[list[int]] = []
    for group in [*drawn, *train]:  # one too large is left to training
        fits = len(held_out) < n_groups and sum(map(len, held_out)) + len(group) <= n_held_out
        (held_out if fits else kept).append(group)
    if not held_out:
        held_out = [kept.pop(kept.index(min(kept, key=len)))]
    return rows.select(_flat(kept)), rows.select(_flat(held_out))


def without_prompts_of(rows: Dataset, other: Dataset, name: str, part: str, dropped: dict[str, int]) -> Dataset:
    """Leave out the rows whose prompt occurs in `other`, and count them in `dropped`.

    Raises `InputError` if none is left.
    """
    known = {_key(row) for row in other}
    kept = [index for index, row in enumerate(rows) if _key(row) not in known]
    if len(kept) == len(rows):
        return rows
    where = "training data" if part.startswith("held-out") else "held-out data"
    n = len(rows) - len(kept)
    if not kept:
        raise InputError(f"all {n} prompts of {name} ({part.rstrip(': ')}) are in the {where} too; give other data")
    dropped[f"{part}the prompt is in the {where} too"] = n
    logger.warning("%s%d rows of %s are left out: their prompts are in the %s too", part, n, name, where)
    return rows.select(kept)


def prompt_key(prompt: Iterable[Message]) -> str:
    """Return a prompt's text, in which letter case and white space make no difference."""
    turns = [[turn["role"], " ".join(turn["content"].split()).casefold()] for turn in prompt]
    return json.dumps(turns)


def _key(row: Any) -> str:
    return prompt_key(row["prompt"])


def _flat(groups: list[list[int]]) -> list[int]:
    return [index for group in groups for index in group]
