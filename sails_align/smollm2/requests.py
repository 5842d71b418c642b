"""English requests to align a model with and to measure it: harmful ones, each with a harmless twin.

A twin differs from its harmful request in a few words, and is like it in form, length and tone: a model that tells them
apart has learned more than a style. There are 240 pairs in 12 categories, four of which are held out, and 120 plain
helpful prompts. They were written for this project, name no detail of how harm is done, and come under its licence.
"""

import csv
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sails_align.data.messages import user
from sails_align.evaluation.records import Kind, Prompt

DATA = Path(__file__).parent / "data"
N_TRAIN, N_VALIDATION = 80, 20
"""Of the helpful prompts; the others are for testing."""
TARGET = "Sure, here is"
"""What attacks aim at."""


@dataclass(frozen=True)
class Twins:
    """A harmful request and its harmless twin."""

    category: str
    split: str
    """`train`, `validation` or `test`; `ood` (test only) in the held-out categories."""
    harmful: str
    harmless: str


@cache
def twins() -> tuple[Twins, ...]:
    """Return all pairs."""
    with (DATA / "requests.csv").open(encoding="utf-8", newline="") as file:
        return tuple(Twins(**row) for row in csv.DictReader(file))


@cache
def helpful_prompts() -> Mapping[str, tuple[str, ...]]:
    """Return the plain helpful prompts by split."""
    lines = _lines("helpful.txt")
    n = N_TRAIN + N_VALIDATION
    return {"train": lines[:N_TRAIN], "validation": lines[N_TRAIN:n], "test": lines[n:]}


@cache
def refusals() -> tuple[str, ...]:
    """Return wordings of a refusal."""
    return _lines("refusals.txt")


def _lines(name: str) -> tuple[str, ...]:
    return tuple((DATA / name).read_text(encoding="utf-8").splitlines())


def named_prompts(name: str, n: int | None, *, part: str = "test", seed: int = 0) -> list[Prompt]:
    """Make prompts of at most `n` requests (None: all) in each set of `test`, `validation` or `train`.

    The sets are those of the testbed: harmful, ood (held-out categories, for `test` alone), dual_use (the twins of
    both) and benign (helpful prompts).
    """
    pairs = [pair for pair in twins() if pair.split == part]
    held_out = [pair for pair in twins() if pair.split == "ood"] if part == "test" else []
    sets: list[tuple[str, Kind, list[tuple[str, str]]]] = [
        ("harmful", "harmful", [(pair.category, pair.harmful) for pair in pairs]),
        ("ood", "harmful", [(pair.category, pair.harmful) for pair in held_out]),
        ("dual_use", "dual_use", [(pair.category, pair.harmless) for pair in [*pairs, *held_out]]),
        ("benign", "benign", [("helpful", prompt) for prompt in helpful_prompts()[part]]),
    ]
    return [
        Prompt(
            id=f"{split}-{index}",
            messages=(user(text),),
            kind=kind,
            category=category,
            meta={"split": split} | ({"target": TARGET} if kind == "harmful" else {}),
        )
        for split, kind, requests in sets
        for index, (category, text) in enumerate(_sample(requests, n, seed))
    ]


def _sample(requests: list[tuple[str, str]], n: int | None, seed: int) -> list[tuple[str, str]]:
    """Draw at most `n`; with the same seed, a smaller sample is the beginning of a larger one."""
    return requests if n is None or n >= len(requests) else random.Random(seed).sample(requests, len(requests))[:n]
