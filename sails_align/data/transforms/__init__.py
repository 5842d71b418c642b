"""Transforms of the training data, one file each, applied in this order.

A transform is a function `transform(examples, options, seed)` from `AlignmentExamples` to `AlignmentExamples`. With its
options left out it changes nothing, or does what every training does.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sails_align.core.registry import Entry, Registry
from sails_align.data.options import (
    ContaminateOptions,
    CurriculumOptions,
    DertaOptions,
    MixOptions,
    NearestRefusalOptions,
)

if TYPE_CHECKING:
    from sails_align.data.pairs import AlignmentExamples

TRANSFORMS = Registry(
    "transform",
    {
        "nearest_refusal": Entry(
            "sails_align.data.transforms.nearest_refusal:transform",
            "Learn the refusal that is nearest to each harmful request.",
            NearestRefusalOptions,
        ),
        "contaminate": Entry(
            "sails_align.data.transforms.contaminate:transform",
            "Swap the chosen and the rejected response of a share of the safety pairs.",
            ContaminateOptions,
        ),
        "derta": Entry(
            "sails_align.data.transforms.derta:transform",
            "Learn to refuse in the middle of a harmful answer.",
            DertaOptions,
        ),
        "mix": Entry(
            "sails_align.data.transforms.mix:transform", "Mix helpful examples into the safety examples.", MixOptions
        ),
        "curriculum": Entry(
            "sails_align.data.transforms.curriculum:transform",
            "Train on the requests nearest to their refusals first.",
            CurriculumOptions,
        ),
    },
)


def transformed(examples: "AlignmentExamples", options: Sequence[Any], seed: int) -> "AlignmentExamples":
    """Apply all transforms in their order; one without its options takes the defaults."""
    for _, entry in TRANSFORMS.items():
        assert entry.options is not None
        own = next((each for each in options if isinstance(each, entry.options)), entry.options())
        examples = entry.load()(examples, own, seed)
    return examples
