"""Likeness to a reference's answers."""

from pathlib import Path

import pytest

from sails_align.cli.evaluate import helpfulness
from sails_align.core.errors import InputError
from sails_align.evaluation.judges.rouge import RougeJudge
from sails_align.evaluation.records import Item, Prompt, Verdict

PROMPT = Prompt("1", ({"role": "user", "content": "How?"},), "benign", "all")


def verdict(response: str, other: str | None) -> Verdict:
    ((_, found),) = RougeJudge().judge("likeness", [Item(PROMPT, response, other)])
    return found


def test_the_longest_common_subsequence_counts() -> None:
    assert verdict("The cat sat.", "the cat sat").score == 1.0
    assert verdict("dogs bark", "the cat sat").score == 0.0
    # 3 words in common in order (the, sat, down), of 4 and of 5: 2 * 3 / 9.
    assert verdict("the dog sat down", "the cat sat right down").score == pytest.approx(2 / 3)
    assert verdict("", "the cat sat").score == 0.0, "no answer is unlike one"
    assert verdict("Кошка спит.", "кошка спит").score == 1.0


def test_what_cannot_be_compared_is_unscored() -> None:
    assert verdict("yes", " ").reason == verdict("yes", "...").reason == "empty response"
    assert verdict("<think>yes", "yes").reason == "unfinished reasoning"
    assert verdict("<think>no</think>yes", "<think>hm</think>yes").score == 1.0
    with pytest.raises(ValueError, match="likeness needs another response"):
        verdict("yes", None)
    with pytest.raises(ValueError, match="says nothing about harm"):
        list(RougeJudge().judge("harm", []))


def test_helpfulness_by_likeness(tmp_path: Path) -> None:
    options = ["--n_prompts", "8", "--progress", "false", "--cache_path", str(tmp_path / "cache.sqlite")]
    metrics = helpfulness([*options, "--judge", "rouge", "--reference", "testbed", "--output_dir", str(tmp_path / "a")])
    assert list(metrics["overall"]) == ["likeness"]
    assert metrics["overall"]["likeness"]["value"] == 1.0, "its own answers"
    metrics = helpfulness([*options, "--judge", "rouge", "--reference", "set", "--output_dir", str(tmp_path / "b")])
    assert 0.5 < metrics["overall"]["likeness"]["value"] < 1.0
    both = ["--judge", "rouge", "oracle", "--reference", "set"]
    metrics = helpfulness([*options, *both, "--output_dir", str(tmp_path / "c")])
    assert {"likeness", "win_rate", "correct_answer_rate"} <= metrics["overall"].keys()
    with pytest.raises(InputError, match=r"rouge cannot judge how helpful answers are; use .* or rouge with"):
        helpfulness([*options, "--judge", "rouge", "--output_dir", str(tmp_path / "d")])
