"""The English requests: harmful ones, each with a harmless twin of the same length and words."""

import re
from collections import Counter

import pytest

from sails_align.evaluation.options import PromptArguments
from sails_align.evaluation.prompts.load import load_all
from sails_align.smollm2.requests import helpful_prompts, named_prompts, refusals, twins


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def test_each_category_has_its_share_of_each_split() -> None:
    counts = Counter((pair.category, pair.split) for pair in twins())
    trained = {category for category, split in counts if split == "train"}
    held_out = {category for category, split in counts if split == "ood"}
    assert len(trained) == 8
    assert len(held_out) == 4
    assert not trained & held_out
    assert all(
        (counts[category, "train"], counts[category, "validation"], counts[category, "test"]) == (12, 4, 4)
        for category in trained
    )
    assert all(counts[category, "ood"] == 20 for category in held_out)


def test_no_request_occurs_twice() -> None:
    requests = [text for pair in twins() for text in (pair.harmful, pair.harmless)]
    requests += [text for part in helpful_prompts().values() for text in part]
    assert len(requests) == 2 * 240 + 120
    assert len({" ".join(words(text)) for text in requests}) == len(requests)


def test_twins_differ_in_what_is_asked_and_not_in_style() -> None:
    for pair in twins():
        harmful, harmless = words(pair.harmful), words(pair.harmless)
        assert abs(len(harmful) - len(harmless)) <= 3, pair
        assert pair.harmful[-1] == pair.harmless[-1], pair
        shared = Counter(harmful) & Counter(harmless)
        assert shared.total() >= 0.3 * min(len(harmful), len(harmless)), pair
    lengths = [len(words(pair.harmful)) - len(words(pair.harmless)) for pair in twins()]
    assert abs(sum(lengths) / len(lengths)) < 0.2, "on average a harmful request is as long as its twin"
    of_harmful, of_harmless = (
        Counter(words(text)[0] for text in side)
        for side in ([pair.harmful for pair in twins()], [pair.harmless for pair in twins()])
    )
    assert (of_harmful & of_harmless).total() >= 0.95 * len(twins()), "no first word gives a side away"


def test_refusals_are_of_different_wordings() -> None:
    assert len(set(refusals())) >= 10


@pytest.mark.parametrize(
    ("part", "sizes"),
    [
        ("test", {"harmful": 32, "ood": 80, "dual_use": 112, "benign": 20}),
        ("validation", {"harmful": 32, "dual_use": 32, "benign": 20}),
    ],
)
def test_as_a_prompt_set(part: str, sizes: dict[str, int]) -> None:
    prompts = load_all(PromptArguments(prompts=["twins"], part=part), seed=0)
    assert Counter(prompt.meta["split"] for prompt in prompts) == sizes
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    trained_on = {pair.harmful for pair in twins() if pair.split == "train"}
    assert not trained_on & {prompt.text for prompt in prompts}
    assert all(("target" in prompt.meta) == (prompt.kind == "harmful") for prompt in prompts)


def test_a_smaller_sample_is_the_beginning_of_a_larger_one() -> None:
    few, more = (named_prompts("twins", n, seed=3) for n in (5, 9))
    for split in ("harmful", "ood", "dual_use", "benign"):
        of_few, of_more = ([p.text for p in prompts if p.meta["split"] == split] for prompts in (few, more))
        assert of_few == of_more[:5]
        assert len(of_more) == 9
