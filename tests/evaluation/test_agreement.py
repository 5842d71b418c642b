"""Votes of judges, and how far they agree."""

import random

import pytest
from sklearn.metrics import cohen_kappa_score

from sails_align.core.errors import InputError
from sails_align.evaluation.agreement import cohen_kappa, confusion, krippendorff_alpha, vote
from sails_align.evaluation.records import Verdict


def verdicts(*scores: float | None) -> list[Verdict]:
    return [Verdict(score) if score is not None else Verdict(None, "unparsable verdict") for score in scores]


@pytest.mark.parametrize(
    ("scores", "lower_is_worse", "expected"),
    [
        ((3,), False, 3),
        ((1, 5, 4), False, 4),
        ((1, 5), False, 5),  # the more harmful one
        ((1, 1, 4, 5), False, 4),
        ((2, 9), True, 2),  # helpfulness: the less helpful one
        ((1, None, 5), False, 5),
        ((1, None, None), False, 1),
        ((0.5, 0.5, 1), True, 0.5),
    ],
)
def test_vote(scores: tuple, lower_is_worse: bool, expected: float):
    found = vote(verdicts(*scores), lower_is_worse=lower_is_worse)
    assert found.score == expected
    assert ("unscored" in (found.explanation or "")) == (None in scores)


def test_a_vote_is_unscored_only_if_nobody_scored():
    nobody = [Verdict(None, "server error"), Verdict(None, "unparsable verdict"), Verdict(None, "unparsable verdict")]
    assert vote(nobody).reason == "unparsable verdict"
    assert vote(nobody[:2]).reason == "server error"
    with pytest.raises(InputError, match="no verdicts"):
        vote([])


def sample(seed: int, n: int = 200) -> tuple[list[float], list[float]]:
    rng = random.Random(seed)
    one = [float(rng.randint(1, 5)) for _ in range(n)]
    return one, [score if rng.random() < 0.6 else float(rng.randint(1, 5)) for score in one]


@pytest.mark.parametrize("weights", [None, "quadratic"])
@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_that_of_scikit_learn(weights, seed: int):
    one, other = sample(seed)
    expected = cohen_kappa_score(one, other, weights=weights, labels=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert cohen_kappa(one, other, weights) == pytest.approx(expected, abs=1e-12)
    shuffled = random.Random(seed).sample(other, len(other))
    assert abs(cohen_kappa(one, shuffled, weights) or 0) < 0.25 < (cohen_kappa(one, other, weights) or 0)


def test_kappa_by_hand():
    # 20 grants: both yes, yes-no, no-yes, both no = 20, 5, 10, 15 (a textbook example): 0.7 observed, 0.5 by chance
    one, other = [1] * 25 + [0] * 25, [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohen_kappa(one, other) == pytest.approx(0.4)
    assert cohen_kappa([1, 5], [5, 1]) == pytest.approx(-1.0)


def test_weights_are_distances_on_the_scale_not_between_ranks():
    """Nobody scored 3 or 4, and yet 2 is nearer to 1 than to 5."""
    one, other = [1, 5, 1, 5, 2], [1, 5, 5, 5, 1]
    on_the_scale = cohen_kappa_score(one, other, weights="quadratic", labels=[1, 2, 3, 4, 5])
    between_ranks = cohen_kappa_score(one, other, weights="quadratic")
    assert cohen_kappa(one, other, "quadratic") == pytest.approx(on_the_scale)
    assert abs(on_the_scale - between_ranks) > 0.05


def test_kappa_of_what_both_scored():
    one, other = sample(0)
    gaps = [None if index % 7 == 0 else score for index, score in enumerate(one)]
    rest = [(x, y) for x, y in zip(gaps, other, strict=True) if x is not None]
    assert cohen_kappa(gaps, other) == cohen_kappa(*map(list, zip(*rest, strict=True)))


@pytest.mark.parametrize(
    ("one", "other"), [([], []), ([None, 1], [1, None]), ([1, 1], [1, 1]), ([5, 5, 1], [5, 5, None])]
)
@pytest.mark.parametrize("weights", [None, "quadratic"])
def test_undefined_agreement_is_none(one: list, other: list, weights):
    assert cohen_kappa(one, other, weights) is None
    assert krippendorff_alpha([one, other]) is None


def test_constant_but_different_judges_agree_as_by_chance():
    assert cohen_kappa([1, 1, 1], [5, 5, 5]) == 0.0
    assert cohen_kappa([1, 1, 1], [5, 5, 5], "quadratic") == 0.0


# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", example C: four observers, twelve units.
N = None
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]


@pytest.mark.parametrize(("level", "expected"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_krippendorffs_own_example(level, expected: float):
    assert krippendorff_alpha(OBSERVERS, level=level) == pytest.approx(expected, abs=5e-4)
    reordered = [OBSERVERS[3], OBSERVERS[1], OBSERVERS[0], OBSERVERS[2]]
    assert krippendorff_alpha(reordered, level=level) == pytest.approx(krippendorff_alpha(OBSERVERS, level=level))


def test_alpha_of_two_observers():
    # the same paper, example A: meetings coded yes or no by two observers
    one, other = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert krippendorff_alpha([one, other], level="nominal") == pytest.approx(0.095, abs=5e-4)
    assert krippendorff_alpha([one, one], level="nominal") == 1.0


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
@pytest.mark.parametrize("seed", range(3))
def test_alpha_of_two_judges_is_kappa_where_there_is_much_to_compare(level, seed: int):
    """Both take chance from the scores that were given; kappa from each judge's own, which here are alike."""
    one, other = sample(seed, 20_000)
    weights = {"nominal": None, "interval": "quadratic"}.get(level)
    alpha = krippendorff_alpha([one, other], level=level)
    if level != "ordinal":
        assert alpha == pytest.approx(cohen_kappa(one, other, weights), abs=0.002)
    shuffled = random.Random(seed).sample(other, len(other))
    assert krippendorff_alpha([one, shuffled], level=level) == pytest.approx(0, abs=0.03)


def test_lone_scores_do_not_matter():
    one, other = [1, 5, 1, 5], [1, 5, 5, 5]
    assert krippendorff_alpha([[*one, 3], [*other, None]]) == krippendorff_alpha([one, other])
    assert krippendorff_alpha([[1, 1, 5], [1, 1, None]]) is None
    assert krippendorff_alpha([]) is None


def test_judges_of_different_items():
    with pytest.raises(InputError, match="same items"):
        cohen_kappa([1], [1, 2])
    with pytest.raises(InputError, match="same items"):
        krippendorff_alpha([[1], [1, 2]])


def test_confusion():
    found = confusion([1, 1, 5, 5, 5, 1], [1, 5, 5, None, 5, 1], labels=[1, 5])
    assert found["counts"] == [[2, 1, 0], [0, 2, 1]]
    assert found["columns"] == [1, 5, "unscored"]
    accuracy = found["accuracy"]
    assert (accuracy["value"], accuracy["n"], accuracy["n_unscored"]) == (0.8, 5, 1)
    assert 0 <= accuracy["ci_low"] < 0.8 < accuracy["ci_high"] <= 1


def test_confusion_of_nothing_and_of_other_labels():
    with pytest.raises(InputError, match="no prompts"):
        confusion([], [], labels=[0, 1])
    with pytest.raises(InputError, match="one verdict a label"):
        confusion([1], [], labels=[0, 1])
    with pytest.raises(InputError, match="3 is no label"):
        confusion([1, 3], [1, 1], labels=[0, 1])
    assert confusion([1, 1], [None, None], labels=[0, 1])["accuracy"]["value"] is None
