"""Tests of the training data that comes with SmolLM2."""

import pytest

import sails_align.smollm2  # noqa: F401 -- registers the data
from sails_align.core.errors import InputError
from sails_align.data.loading import load_rows
from sails_align.data.pairs import normalize
from sails_align.evaluation.judges.rules import is_refusal
from sails_align.smollm2.requests import helpful_prompts, twins


def requests(side: str, *splits: str) -> set[str]:
    return {getattr(pair, side) for pair in twins() if pair.split in splits}


def test_harmful_requests_are_refused_and_were_answered() -> None:
    for split, part, least in (("train", "train", 70), ("test", "validation", 20)):
        rows = normalize(load_rows("twins-refused", split=split), name="twins-refused").dataset
        assert {row[0]["content"] for row in rows["prompt"]} <= requests("harmful", part)
        assert len(rows) >= least
        categories = {pair.harmful: pair.category for pair in twins()}
        assert rows["category"] == [categories[row[0]["content"]] for row in rows["prompt"]]
        assert all(map(is_refusal, rows["chosen"]))
        assert not any(map(is_refusal, rows["rejected"]))
    assert len(set(load_rows("twins-refused")["chosen"])) == 12, "all wordings"


def test_harmless_requests_have_the_own_answers_of_the_model() -> None:
    for split, part, least in (("train", "train", 140), ("test", "validation", 35)):
        rows = normalize(load_rows("twins-answered", split=split), name="twins-answered").dataset
        asked = {row[0]["content"] for row in rows["prompt"]}
        assert asked <= requests("harmless", part) | set(helpful_prompts()[part])
        assert len(asked) == len(rows) >= least
        assert not any(map(is_refusal, rows["chosen"]))
        assert all(map(is_refusal, rows["rejected"]))


def test_what_is_for_testing_is_in_no_split() -> None:
    tested = requests("harmful", "test", "ood") | requests("harmless", "test", "ood") | set(helpful_prompts()["test"])
    for name in ("twins-refused", "twins-answered"):
        for split in ("train", "validation", "test"):
            assert tested.isdisjoint(load_rows(name, split=split)["prompt"])


def test_another_split_is_refused() -> None:
    with pytest.raises(InputError, match="twins-refused has no split 'dev'; leave the name of the split out"):
        load_rows("twins-refused", split="dev")
