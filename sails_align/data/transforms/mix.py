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
    return replace(examples, helpful=helpful, train=mix(examples.train, helpful, options.helpful_ratio, seed))


def mix(safety: Dataset, helpful: Dataset, ratio: float, seed: int) -> Dataset:
    """Combine all safety examples with `ratio` times as many helpful ones, drawn and ordered by the seed.

    The column `rejected` is kept only if both datasets have it; in any other column that one of them lacks, its rows
    have None. Raises `InputError` if there are too few helpful examples.
    """
    needed = round(ratio * len(safety))
    if needed > len(helpful):
        raise InputError(
            f"a ratio of {ratio} needs {needed} helpful examples for {len(safety)} safety examples, and there are "
            f"{len(helpful)};\nlower the ratio to {math.floor(100 * len(helpful) / len(safety)) / 100}, or give more"
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
