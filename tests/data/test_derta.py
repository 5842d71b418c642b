"""The transform `derta`: which examples it makes of pairs."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sails_align.core.errors import InputError
from sails_align.data.options import DertaOptions, MixOptions
from sails_align.data.pairs import AlignmentExamples
from sails_align.data.transforms import transformed
from sails_align.data.transforms.derta import drawn, first_words, transform

N = 30
HARMFUL = "one two  three\nfour five six"


def examples(n: int = N) -> AlignmentExamples:
    def rows(name: str, n: int) -> Dataset:
        prompts = [[{"role": "user", "content": f"{name} {i}"}] for i in range(n)]
        return Dataset.from_dict({"prompt": prompts, "chosen": ["no"] * n, "rejected": [HARMFUL] * n})

    safety = rows("harmful", n)
    return AlignmentExamples(safety, rows("harmless", 4 * n), train=safety)


def made(seed: int = 0, **options: Any) -> list[Any]:
    return transform(examples(), DertaOptions(**options), seed).train.to_list()


def test_as_in_the_paper_each_pair_is_a_prefix_example_and_an_rto_example():
    rows = made(derta_prefix_share=1.0, derta_rto_share=1.0)
    prefix, rto = rows[:N], rows[N:]
    assert [row["prompt"] for row in prefix] == [row["prompt"] for row in rto] == examples().safety["prompt"][:]
    assert all((row["prefill"], row["transition"], row["chosen"]) == (HARMFUL, "no", "no") for row in rto)
    assert {row["transition"] for row in prefix} == {None}
    n_words = Counter(len(row["prefill"].split()) for row in prefix)
    assert n_words[0] == N / 3
    assert set(n_words) == {0, 1, 2, 3, 4}, "of six words"
    assert all(HARMFUL.startswith(row["prefill"]) for row in prefix), "white space as it is"


def test_the_seed_decides_and_shares_are_of_whole_pairs():
    options = {"derta_prefix_share": 0.5, "derta_empty_share": 0.0, "derta_rto_share": 0.2, "derta_refusal": "no"}
    rows = made(**options)
    assert rows == made(**options)
    assert rows != made(seed=1, **options)
    assert sum(bool(row["prefill"]) and row["transition"] is None for row in rows) == N / 2
    assert [row["transition"] for row in rows if row["transition"] is not None] == ["no"] * (N // 5)


def test_discovery_sees_the_pairs_and_the_helpful_examples_of_a_training_without_it():
    plain, options = transformed(examples(), [], 0), DertaOptions(derta_prefix_share=1.0, derta_rto_share=1.0)
    mixed = transformed(examples(), [options, MixOptions()], 0)
    assert mixed.safety.to_list() == plain.safety.to_list()
    assert mixed.helpful is not None
    assert plain.helpful is not None
    assert mixed.helpful.to_list() == plain.helpful.to_list()
    kinds = Counter(row["prompt"][0]["content"].split()[0] for row in mixed.train)  # pyright: ignore
    assert kinds == {"harmful": 2 * N, "harmless": N}
    assert {row["prefill"] for row in mixed.train if "harmless" in str(row["prompt"])} == {None}  # pyright: ignore


def test_without_any_words_the_order_of_training_is_that_of_plain_refusals():
    options = DertaOptions(derta_prefix_share=1.0, derta_empty_share=1.0)
    plain, empty = (transformed(examples(), of, 3).train for of in ([], [options]))
    assert [row["prompt"] for row in empty] == [row["prompt"] for row in plain]  # pyright: ignore
    assert {row["prefill"] for row in empty} == {"", None}  # pyright: ignore


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["a", "bc"]), min_size=1, max_size=8), st.integers(0, 99))
def test_words_of_a_prefix(words: list[str], seed: int):
    text = f" {' '.join(words)} "
    n = drawn(text, np.random.default_rng(seed))
    assert 1 <= n <= max(1, len(words) - 2)
    assert first_words(text, n) == " ".join(words[:n])
    assert first_words(text, 0) == first_words(" ", 3) == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"derta_prefix_share": 1.1}, "derta_prefix_share is 1.1, but it is a share"),
        ({"derta_empty_share": -0.1}, "derta_empty_share is -0.1, but it is a share"),
        ({"derta_rto_share": float("nan")}, "derta_rto_share is nan, but it is a share"),
        ({"derta_refusal": "no"}, "derta_refusal is given without derta_rto_share"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], said: str):
    with pytest.raises(InputError, match=re.escape(said)):
        DertaOptions(**options)


def test_without_harmful_answers_it_is_refused():
    given = examples()
    given = replace(given, train=given.train.remove_columns("rejected"))
    with pytest.raises(InputError, match=r"derta_rto_share is 0\.5, but the safety data has no rejected responses"):
        transform(given, DertaOptions(derta_rto_share=0.5), 0)
