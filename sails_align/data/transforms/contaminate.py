"""Give some safety pairs wrong labels, to study their effect.

Of a share of the pairs, which the seed chooses, the chosen and the rejected response change places.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from sails_align.core.errors import InputError
from sails_align.data.options import ContaminateOptions
from sails_align.data.pairs import AlignmentExamples


def transform(examples: AlignmentExamples, options: ContaminateOptions, seed: int) -> AlignmentExamples:
    """Swap the chosen and rejected responses of a share of the safety pairs (rounded to whole pairs)."""
    share, pairs = options.contamination, examples.safety
    if share == 0:
        return examples
    if "rejected" not in pairs.column_names:
        raise InputError(f"contamination is {share}, but the safety data has no rejected responses; leave it out")
    wrong = set(np.random.default_rng(seed).permutation(len(pairs))[: round(share * len(pairs))].tolist())

    def swap(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"chosen": row["rejected"], "rejected": row["chosen"]} if index in wrong else {}

    safety = pairs.map(swap, with_indices=True, keep_in_memory=True)
    return replace(examples, safety=safety, train=safety)
