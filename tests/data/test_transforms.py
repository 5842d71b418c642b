"""Transforms of the training data, and the options of the data."""

from dataclasses import replace
from typing import Any

import pytest
from datasets import Dataset

from sails_align.core.errors import InputError
from sails_align.data.options import ContaminateOptions, DataOptions, MixOptions
from sails_align.data.pairs import AlignmentExamples
from sails_align.data.transforms import TRANSFORMS, transformed


def examples(n: int) -> AlignmentExamples:
    def rows(name: str) -> Dataset:
        ids = range(n)
        prompts = [[{"role": "user", "content": f"{name} {i}"}] for i in ids]
        return Dataset.from_dict(
            {"prompt": prompts, "chosen": [f"good {i}" for i in ids], "rejected": [f"bad {i}" for i in ids]}
        )

    safety = rows("harmful")
    return AlignmentExamples(safety, rows("harmless"), train=safety)


def test_without_options_all_safety_pairs_and_as_many_helpful_ones_are_trained_on():
    given = examples(6)
    made = transformed(given, [], seed=0)
    assert made.safety.to_list() == given.safety.to_list()
    assert len(made.train) == 12
    assert made.train.to_list() == transformed(given, [], seed=0).train.to_list()


def test_transforms_act_in_order_and_what_is_contaminated_is_trained_on():
    made = transformed(examples(6), [MixOptions(helpful_ratio=0.5), ContaminateOptions(contamination=1.0)], seed=0)
    wrong = [row for row in made.train if row["chosen"].startswith("bad")]  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert len(wrong) == 6, "the safety pairs, and no helpful ones"
    assert len(made.train) == 9
    assert made.helpful is not None
    assert len(made.helpful) == 3, "discovery sees the helpful examples that are trained on"


@pytest.mark.parametrize("name", TRANSFORMS.names())
def test_a_transform_that_has_nothing_to_do_changes_nothing(name: str):
    given = replace(examples(3), helpful=None)
    entry = TRANSFORMS.get(name)
    assert entry.options is not None
    assert entry.load()(given, entry.options(), 0) is given


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        (MixOptions, {"helpful_ratio": -1.0}),
        (MixOptions, {"helpful_ratio": float("nan")}),
        (ContaminateOptions, {"contamination": 1.5}),
        (DataOptions, {"eval_examples": 0}),
        (DataOptions, {"max_train_examples": 0}),
        (DataOptions, {"on_bad_rows": "other"}),
    ],
)
def test_values_out_of_range(options: type, bad: dict[str, Any]):
    with pytest.raises(InputError) as error:
        options(**bad)
    assert all(f"{name} is {value!r}" in str(error.value) for name, value in bad.items())
