"""Find the four sets of units of a model, and how stable they are.

Shapes: as in `scores`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.data.tokens import TokenizedSide, tokenize_response
from sails_align.units.layout import n_channels
from sails_align.units.options import UnitOptions
from sails_align.units.scores import channel_stats, unit_scores
from sails_align.units.sets import SETS, Units, overlap


def conversations(
    tokenizer: PreTrainedTokenizerBase, rows: Dataset, n: int, max_length: int, seed: int
) -> list[TokenizedSide]:
    """Tokenize at most n rows with their chosen responses. The mask has all tokens but the first.

    The first token's activations are massive in many models, whatever follows it (arXiv 2402.17762).
    """
    some = rows.shuffle(seed=seed).select(range(min(n, len(rows))))
    whole = [tokenize_response(tokenizer, row["prompt"], row["chosen"], max_length) for row in some]  # pyright: ignore[reportArgumentType, reportCallIssue]
    return [TokenizedSide(side.input_ids, [False] + [True] * (len(side.input_ids) - 1)) for side in whole]


def find_units(
    model: nn.Module,
    safety: Sequence[TokenizedSide],
    utility: Sequence[TokenizedSide],
    options: UnitOptions,
    say: Callable[[str], object] = lambda line: None,
) -> Units:
    """Score all units on both sets of conversations and divide them.

    The provenance has the number of tokens, the size of each set, and `overlap`: the share of each set that is found
    again from the other half of the conversations. By chance that would be the set's own share of the units.

    Args:
        model: in memory; is not changed.
        safety: conversations about harmful requests with the model's own kind of answer, refusals.
        utility: conversations about harmless requests with answers.
        options: the shares of the sets.
        say: is given a line before each pass.

    Raises:
        InputError: if the model's architecture is not known, or a set has fewer than two conversations.
    """
    n_channels(model)
    halves: dict[str, list[Any]] = {"safety": [], "utility": []}
    for name, sequences in (("safety", safety), ("utility", utility)):
        if len(sequences) < 2:
            raise InputError(f"there is {len(sequences)} conversation for {name}; give two or more")
        say(f"    {name}: {len(sequences):,} conversations")
        halves[name] = [channel_stats(model, sequences[half::2]) for half in (0, 1)]
    both = {name: {key: one[key] + other[key] for key in one} for name, (one, other) in halves.items()}
    parts = [
        Units.of(*(unit_scores(model, halves[name][half]) for name in ("safety", "utility")), options=options)
        for half in (0, 1)
    ]
    units = Units.of(*(unit_scores(model, both[name]) for name in ("safety", "utility")), options=options)
    counts = {name: units.count(name) for name in SETS}
    about = {
        "n_units": len(units),
        "n_tokens": {name: next(iter(stats.values())).n for name, stats in both.items()},
        "sets": counts,
        "overlap": {name: overlap(*parts, name=name) for name in SETS},
        "by_chance": {name: n / len(units) for name, n in counts.items()},
    }
    return replace(units, provenance=about)
