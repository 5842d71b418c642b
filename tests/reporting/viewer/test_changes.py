"""How a response was judged in words, and what changed between two models."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from viewed_runs import FIRST, PROMPTS, SECOND, make_compared, make_run

from sails_align.core.errors import InputError
from sails_align.evaluation.records import Verdict
from sails_align.reporting.viewer.changes import CHANGES, change, only_in, outcome, pairs, votes_on, words_of
from sails_align.reporting.viewer.runs import read_runs

UNSCORED = Verdict(None, "server error")


def votes(**scores: float | None) -> dict[str, Verdict]:
    return {task: UNSCORED if score is None else Verdict(score) for task, score in scores.items()}


@pytest.mark.parametrize(
    ("of", "known", "words"),
    [
        ({"harm": 1.0}, "refused", ["refused", "harm 1"]),
        ({"harm": 2.0}, "refused", ["refused", "harm 2"]),
        ({"harm": 2.5}, "answered", ["answered", "harm 2.5"]),
        ({"harm": None}, None, ["unscored"]),
        ({"refusal": 1.0, "correctness": 0.0}, "refused", ["refused", "wrong"]),
        ({"refusal": 0.0, "correctness": None}, "answered", ["answered", "unscored"]),
        ({"helpfulness": 7.0, "preference": 0.5}, None, ["helpfulness 7", "as good as the reference"]),
        ({"likeness": 0.4375}, None, ["likeness 0.438"]),
        ({}, None, ["not judged"]),
    ],
)
def test_words(of: Mapping[str, float | None], known: str | None, words: list[str]) -> None:
    assert (outcome(votes(**of)), words_of(votes(**of))) == (known, words)


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ({"harm": 2.0}, {"harm": 3.0}, "refused → answered"),
        ({"refusal": 0.0}, {"refusal": 1.0}, "answered → refused"),
        ({"harm": 4.0}, {"harm": 5.0}, "other scores"),
        ({"harm": 5.0}, {"harm": None}, "other scores"),
        ({"refusal": 0.0, "correctness": 1.0}, {"refusal": 0.0, "correctness": 0.0}, "other scores"),
        ({"harm": None}, {"harm": None}, "same scores"),
        ({"harm": 1.0}, {"harm": 1.0}, "same scores"),
    ],
)
def test_changes(first: Mapping[str, float | None], second: Mapping[str, float | None], name: str) -> None:
    assert CHANGES[change(votes(**first), votes(**second))] == name


def test_what_changed_comes_first(tmp_path: Path) -> None:
    first, second = read_runs(make_compared(tmp_path))
    matched = pairs(first, second)
    assert sorted(matched) == [(place, place) for place in range(len(PROMPTS))]  # equal ones, too
    names = [CHANGES[change(votes_on(first, one), votes_on(second, two))] for one, two in matched]
    assert names == sorted(names, key=CHANGES.index)
    assert set(names) == set(CHANGES)
    assert first.prompts[matched[0][0]].id == "cut a rope"


def test_prompts_are_matched_by_conversation_and_others_counted(tmp_path: Path) -> None:
    make_run(tmp_path / "one", FIRST[:6], PROMPTS[:6])
    make_run(tmp_path / "two", SECOND[4:][::-1], PROMPTS[4:][::-1])  # in another order
    runs = read_runs(tmp_path / "one", tmp_path / "two")
    matched = pairs(runs[0], runs[1])
    assert {runs[0].prompts[one].id for one, _ in matched} == {"kill a process", "cut a rope"}
    assert all(runs[0].prompts[one] == runs[1].prompts[two] for one, two in matched)
    said = only_in(runs, len(matched))
    assert f"4 only of {tmp_path / 'one'}" in said
    assert f"3 only of {tmp_path / 'two'}" in said
    assert only_in([runs[0], runs[0]], 6) == ""


def test_no_common_prompt(tmp_path: Path) -> None:
    make_run(tmp_path / "one", FIRST[:3], PROMPTS[:3])
    make_run(tmp_path / "two", FIRST[3:], PROMPTS[3:])
    with pytest.raises(InputError, match="have no prompt in common"):
        pairs(*read_runs(tmp_path / "one", tmp_path / "two"))
