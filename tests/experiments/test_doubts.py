"""Which seeds are unstable."""

import pytest

from sails_align.experiments.doubts import UnstableSeed, no_right_answers, unstable_seeds


def of_seeds(name: str, *values: float | None, **others: float) -> dict[int, dict[str, float | None]]:
    return {seed: {name: value, **others} for seed, value in enumerate(values)}


@pytest.mark.parametrize(
    ("by_seed", "unstable"),
    [
        (of_seeds("correct_answer_rate", 0.9, 0.85, 0.0, 0.92), [2]),
        (of_seeds("correct_answer_rate", 0.0), []),  # nothing is known of other seeds
        (of_seeds("correct_answer_rate", *[0.0] * 10), []),  # all seeds are alike
        (of_seeds("correct_answer_rate", 0.04, 0.03, 0.02), []),
        (of_seeds("correct_answer_rate", 0.04, 0.03, 0.06), [0, 1]),
        (of_seeds("correct_answer_rate", 0.9, 0.5, 0.85), [1]),  # far from the median
        (of_seeds("correct_answer_rate", 0.9, 0.65, 0.85), []),
        (of_seeds("correct_answer_rate", 0.9, 0.4), []),  # which of the two is the odd one is not known
        (of_seeds("safety_rate", 0.0, 0.0, 0.0, helpfulness=8.0), []),  # unsafe is not broken
        (of_seeds("safety_rate", 0.95, 0.2, 0.97, helpfulness=8.0), [1]),
        (of_seeds("helpfulness", 7.0, 1.2, 7.5, safety_rate=1.0), [1]),
        (of_seeds("helpfulness", 1.0, None), []),
        (of_seeds("helpfulness", 1.0, None, 2.0), [0]),
        (of_seeds("safety_rate", 1.0, 1.0, 0.2, correct_answer_rate=0.0), [2]),  # useless, and unstable in safety
        (of_seeds("over_refusal_rate", 1.0, 0.0, 0.0), []),  # not known what it answers
        ({}, []),
    ],
)
def test_unstable_seeds(by_seed: dict[int, dict[str, float | None]], unstable: list[int]) -> None:
    assert [of.seed for of in unstable_seeds(by_seed)] == unstable


def test_right_answers_count_before_scores() -> None:
    by_seed = of_seeds("correct_answer_rate", 0.9, 0.9, 0.9, helpfulness=1.0)
    assert unstable_seeds(by_seed) == []
    assert str(UnstableSeed(3, "helpfulness", 1.0, 7.25)) == "seed 3 has helpfulness (1-10) 1.00 (median 7.25)"


def test_seeds_that_are_alike_without_right_answers_are_told() -> None:
    found = no_right_answers(of_seeds("correct_answer_rate", 0.0, 0.035, 0.01, safety_rate=1.0))
    assert found == "it gives next to no right answer on any seed: correct answers (%) at most 3.5"
    assert no_right_answers(of_seeds("correct_answer_rate", 0.0, 0.06)) is None
    assert no_right_answers(of_seeds("safety_rate", 0.0)) is None, "not known what it answers"
    assert no_right_answers({}) is None
