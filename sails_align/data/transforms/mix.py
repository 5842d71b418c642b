"""Mix helpful examples into the safety examples, so that the model also learns to answer."""

import math
from dataclasses import replace

import numpy as np
from datasets import Dataset, concatenate_datasets

from sails_align.core.errors import InputError
from sails_align.data.options import MixOptions
from sails_align.data.pairs import AlignmentExamples


def transform(examples: AlignmentExamples, options: MixOptions, seed: int) -> AlignmentExamples:
    """Add helpful examples to the training examples, as many as the ratio says."""
    needed = round(options.helpful_ratio * len(examples.safety))
    if examples.helpful is None or needed == 0:
        return examples
    # Discovery sees the examples that are trained on and no others, so that it is no way to more data.
    helpful = examples.helpful.shuffle(seed=seed).select(range(min(needed, len(examples.helpful))))
    mixed = mix(examples.train, helpful, options.helpful_ratio, seed, n_safety=len(examples.safety))
    return replace(examples, helpful=helpful, train=mixed)


def mix(safety: Dataset, helpful: Dataset, ratio: float, seed: int, *, n_safety: int | None = None) -> Dataset:
    """Combine all safety examples with `ratio` times as many helpful ones, drawn and ordered by the seed.

    With `n_safety`, the ratio is to that number, where some safety pairs have become several examples.
    The column `rejected` is kept only if both datasets have it; in any other column that one of them lacks, its rows
    have None. Raises `InputError` if there are too few helpful examples.
    """
    n_safety = len(safety) if n_safety is None else n_safety
    needed = round(ratio * n_safety)
    if needed > len(helpful):
        raise InputError(
            f"a ratio of {ratio} needs {needed} helpful examples for {n_safety} safety examples, and there are "
            f"{len(helpful)};\nlower the ratio to {math.floor(100 * len(helpful) / n_safety) / 100}, or give more"
        )
    rng = np.random.default_rng(seed)
    drawn = helpful.select(rng.permutation(len(helpful))[:needed], keep_in_memory=True)
    if ("rejected" in safety.column_names) != ("rejected" in helpful.column_names):
        safety, drawn = (
            part.remove_columns([column for column in part.column_names if column == "rejected"])
            for part in (safety, drawn)
        )
    both = concatenate_datasets([safety, drawn])
    return both.select(rng.permutation(len(both)), keep_in_memory=True)
