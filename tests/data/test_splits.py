"""A prompt is either trained on or held out."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sails_align.core.errors import InputError
from sails_align.data.splits import split_by_prompt, without_prompts_of


def rows(prompts: list[str]) -> Dataset:
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": prompt}], "chosen": str(n)} for n, prompt in enumerate(prompts)]
    )


def prompts_of(dataset: Dataset) -> set[str]:
    return {prompt[0]["content"].strip().lower() for prompt in dataset["prompt"]}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=30, max_size=60), st.integers(1, 20), st.integers(0, 3))
def test_no_prompt_is_on_both_sides(numbers: list[int], n: int, seed: int):
    data = rows([f"q{number}" if index % 2 else f"Q{number} " for index, number in enumerate(numbers)])
    if len(set(numbers)) < 2:
        with pytest.raises(InputError, match="different prompts"):
            split_by_prompt(data, n, seed, "data")
        return
    train, held_out = split_by_prompt(data, n, seed, "data")
    assert not prompts_of(train) & prompts_of(held_out)
    assert sorted(map(int, [*train["chosen"], *held_out["chosen"]])) == list(range(len(data)))  # nothing is lost
    assert len(prompts_of(held_out)) <= max(1, len(set(numbers)) // 5)
    assert len(held_out) > 0


def test_different_prompts_are_split_as_datasets_does(caplog: pytest.LogCaptureFixture):
    data = rows([f"q{number}" for number in range(40)])
    train, held_out = split_by_prompt(data, 6, 1, "data")
    expected = data.train_test_split(test_size=6, seed=1)
    assert train.to_list() == expected["train"].to_list()
    assert held_out.to_list() == expected["test"].to_list()
    assert not caplog.text
    split_by_prompt(rows([f"q{number % 10}" for number in range(40)]), 6, 1, "data")
    assert "data: 30 rows repeat a prompt" in caplog.text


def test_held_out_rows_that_are_trained_on_are_left_out_and_counted():
    dropped: dict[str, int] = {}
    kept = without_prompts_of(rows(["a", "b", "c"]), rows(["A ", "d"]), "data", "held-out data: ", dropped)
    assert prompts_of(kept) == {"b", "c"}
    assert dropped == {"held-out data: the prompt is in the training data too": 1}
    assert without_prompts_of(kept, rows(["d"]), "data", "", {}) is kept
    with pytest.raises(InputError, match="all 1 prompts of data"):
        without_prompts_of(rows(["a"]), rows(["a"]), "data", "held-out data: ", {})
