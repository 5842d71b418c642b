"""Rows with labels: a response that is labelled bad is never learnt from."""

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from sails_align.core.errors import InputError
from sails_align.data.formats import Columns
from sails_align.data.loading import load_rows
from sails_align.data.options import DataOptions
from sails_align.data.pairs import normalize, to_preference, to_sft

GOOD, BAD = "Here is how.", "Wrong and unsafe text."
LABELS = {
    "is_safe": (True, False),
    "label": (True, False),
    "response_harm_label": ("unharmful", "harmful"),
    "response_label": ("safe", "unsafe"),
    "Is_Safe": ("True", "False"),  # as in csv
    "is_response_safe": (1, 0),
    "kto_tag": (True, False),
}


def rows(label: str, good: object, bad: object, column: str = "response") -> Dataset:
    """Two prompts with a good and a bad response each, one with a good and one with a bad response alone."""
    labelled = [(f"q{n}", text, value) for n in range(2) for text, value in ((f"{GOOD}{n}", good), (f"{BAD}{n}", bad))]
    labelled += [("good alone", GOOD, good), ("bad alone", BAD, bad)]
    return Dataset.from_list([{"prompt": p, column: text, label: value} for p, text, value in labelled])


@pytest.mark.parametrize("column", ["response", "completion"])
@pytest.mark.parametrize("label", LABELS)
def test_bad_responses_are_dropped_and_counted(label: str, column: str, caplog: pytest.LogCaptureFixture):
    found = normalize(rows(label, *LABELS[label], column), name="labelled")
    assert found.dataset["chosen"][:] == [f"{GOOD}0", f"{GOOD}1", GOOD]
    assert found.dataset.column_names == ["prompt", "chosen"]
    assert found.dropped == {"the response is labelled bad": 3}
    assert "labelled: 3 of 6 rows are left out by their labels" in caplog.text
    assert all(GOOD in row["completion"][0]["content"] for row in to_sft(found.dataset))


def test_bad_responses_are_paired():
    found = normalize(rows("is_safe", True, False), pair=True)
    assert [(row["chosen"], row["rejected"]) for row in found.dataset] == [(f"{GOOD}{n}", f"{BAD}{n}") for n in (0, 1)]
    assert found.dropped == {"the response is labelled bad": 1, "no response to the prompt is labelled bad": 1}
    assert found.n_paired == 2
    assert len(to_preference(found.dataset)) == 2
    with pytest.raises(InputError, match="--bad_responses pair"):
        to_preference(normalize(rows("is_safe", True, False)).dataset)


def test_labels_that_disagree_count_as_bad():
    given = [("a", GOOD, True), ("a", GOOD, False), ("b", GOOD, True)]
    found = normalize(Dataset.from_list([{"prompt": p, "response": r, "is_safe": safe} for p, r, safe in given]))
    assert [row["prompt"][0]["content"] for row in found.dataset] == ["b"]
    assert found.dropped == {
        "the response is labelled bad": 1,
        "the response is labelled both good and bad": 1,
    }
    both = [{"prompt": "a", "response": GOOD, "is_safe": True, "label": label} for label in (True, False)]
    assert normalize(Dataset.from_list([*both, {**both[0], "prompt": "b"}])).dropped.keys() >= {
        "the response is labelled bad"
    }


@pytest.mark.parametrize(("good", "bad"), [(1, 0), (1, -1), ("1", "0"), (1.0, 0.0), (0, 1)])
def test_numbers_as_label_are_refused_until_told(good: object, bad: object):
    given = rows("label", good, bad)
    values = "-1, 1" if bad == -1 else "0, 1"
    with pytest.raises(InputError) as error:
        normalize(given, name="mine", on_bad_rows="skip")
    assert f"the label 'label' of mine has the values {values}, and it is not known which are those" in str(error.value)
    assert "Give --label_column label with --good_labels 1 (or the other values" in str(error.value)
    with pytest.raises(InputError, match="Give --helpful_label_column label with"):
        normalize(given, columns=DataOptions().columns(helpful=True))
    found = normalize(given, columns=Columns(label="label", good_labels=(str(good),)))
    assert found.dataset["chosen"][:] == [f"{GOOD}0", f"{GOOD}1", GOOD]
    assert found.dropped == {"the response is labelled bad": 3}


def test_a_label_that_says_nothing_is_a_bad_row():
    given = Dataset.from_list(
        [{"prompt": str(n), "response": GOOD, "response_harm_label": value} for n, value in enumerate(LABEL_VALUES)]
    )
    with pytest.raises(InputError) as error:
        normalize(given)
    assert "response_harm_label, a label, is empty: 1 (row 1)" in str(error.value)
    assert "response_harm_label is a label of unknown meaning (perhaps)" in str(error.value)
    assert len(normalize(given, on_bad_rows="skip").dataset) == 1


LABEL_VALUES = ["unharmful", None, "perhaps"]


def test_all_bad():
    with pytest.raises(InputError, match="no response to learn from"):
        normalize(rows("is_safe", False, False))


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("unsafe", [0, 1]),
        ("isHarmful", [0, 1]),
        ("toxicity", [0.1, 0.9]),
        ("quality", ["high", "low"]),
        ("score", [1, 5]),
        ("ok", [True, False]),
        ("annotator", ["safe", "unsafe"]),
        ("label", [0, 1]),
        ("fine", [1, 0, 0]),
        ("fine", ["1", "0", "0"]),  # as in csv
        ("fine", [1.0, 0.0, None]),
        ("fine", ["pass", "fail"]),
        ("metadata", [{"label": "a"}, {"label": "b"}]),
    ],
)
def test_an_unknown_label_is_refused_until_told(column: str, values: list):
    given = Dataset.from_list([{"prompt": str(n), "response": GOOD, column: value} for n, value in enumerate(values)])
    with pytest.raises(InputError) as error:
        normalize(given, name="mine.jsonl")
    assert f"{column}" in str(error.value)
    assert "--good_labels" in str(error.value)
    told = normalize(
        given,
        columns=Columns(label=column, good_labels=(str(values[0]),)),
        on_bad_rows="skip" if None in values else "error",
    )
    assert [row["prompt"][0]["content"] for row in told.dataset] == ["0"]
    assert len(normalize(given, columns=Columns(label="none")).dataset) == len(values)


@pytest.mark.parametrize(("column", "values"), [("source", ["y", "y"]), ("n", [1, 2]), ("about", ["positive"] * 2)])
def test_columns_that_are_no_labels(column: str, values: list):
    given = Dataset.from_list([{"prompt": str(n), "response": GOOD, column: value} for n, value in enumerate(values)])
    assert len(normalize(given).dataset) == 2


def test_a_label_after_a_thousand_rows_of_one_value():
    values = [*["safe"] * 1500, "odd"]
    given = Dataset.from_dict({"prompt": list(map(str, range(1501))), "response": [GOOD] * 1501, "fine": values})
    assert len(normalize(given).dataset) == 1501
    values[-1] = "unsafe"
    with pytest.raises(InputError, match="'fine' that looks like a label"):
        normalize(Dataset.from_dict({**given.to_dict(), "fine": values}))


@pytest.mark.parametrize("column", ["label", "fine"])
def test_classes_are_labels_by_name(column: str):
    features = Features(
        {**dict.fromkeys(["prompt", "response"], Value("string")), column: ClassLabel(names=["unsafe", "safe"])}
    )
    given = Dataset.from_dict({"prompt": ["a", "b"], "response": [GOOD, BAD], column: [1, 0]}, features)
    if column == "fine":
        with pytest.raises(InputError, match="looks like a label"):
            normalize(given)
    columns = Columns() if column == "label" else Columns(label=column, good_labels=("safe",))
    assert normalize(given, columns=columns).dataset["chosen"][:] == [GOOD]


@pytest.mark.parametrize("more", [{"winner": "a"}, {"label": 1}, {"better_model": "x"}])
def test_labels_beside_pairs(more: dict):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 9.0, "chosen-rating": 1, "source": "safe"}
    assert len(normalize(Dataset.from_list([pair])).dataset) == 1
    with pytest.raises(InputError, match="looks like a label"):
        normalize(Dataset.from_list([{**pair, **more}]))


def test_labels_of_prompts_do_not_matter():
    row = {"prompt": "a", "response": "b", "prompt_harm_label": "harmful", "adversarial": True, "harmful": True}
    assert len(normalize(Dataset.from_list([row])).dataset) == 1


def test_kinds_of_harm_beside_a_known_label():
    row = {"prompt": "a", "response": "b", "is_safe": True, "Physical Harm": False, "severity_level": 0}
    row["category"] = {"theft": False}
    assert len(normalize(Dataset.from_list([row])).dataset) == 1
    with pytest.raises(InputError, match="'quality' that looks like a label"):
        normalize(Dataset.from_list([{**row, "quality": 3}]))


def test_missing_label_columns():
    given = rows("is_safe", True, False)
    with pytest.raises(InputError, match="no column 'grade' for the label"):
        normalize(given, columns=Columns(label="grade"))
    with pytest.raises(InputError, match="--good_labels"):
        normalize(given.rename_column("is_safe", "grade"), columns=Columns(label="grade"))
    for bad in ({"good_labels": ["true"]}, {"rejected_column": "x"}, {"bad_responses": "keep"}):
        with pytest.raises(InputError):
            DataOptions(**bad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("file", ["is_safe.jsonl", "kto.jsonl"])
def test_labelled_cases(shared: Path, file: str):
    path = shared / "cases/labelled_rows" / file
    if not path.is_file():
        pytest.skip(f"no {path}")
    found = normalize(load_rows(str(path)))
    assert set(found.dataset["chosen"]) == {GOOD}
    assert found.dropped == {"the response is labelled bad": len(load_rows(str(path))) // 2}


# ----------------------------------------------------------------------------------------------------- PKU-SafeRLHF

PKU = {
    "prompt": "q",
    "response_0": "zero",
    "response_1": "one",
    "is_response_0_safe": True,
    "is_response_1_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}


def test_pku_takes_the_safer_response():
    assert normalize(Dataset.from_list([PKU])).dataset[0] == {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": "one",
        "rejected": "zero",
    }
    without = {name: value for name, value in PKU.items() if name != "safer_response_id"}
    assert normalize(Dataset.from_list([without])).dataset[0]["chosen"] == "zero"
    bare = {name: value for name, value in PKU.items() if not name.startswith("is_")}
    assert normalize(Dataset.from_list([bare])).dataset[0]["chosen"] == "one"


def test_pku_leaves_out_pairs_whose_safer_response_is_unsafe():
    found = normalize(Dataset.from_list([PKU, {**PKU, "prompt": "r", "is_response_1_safe": False}]))
    assert (len(found.dataset), found.dropped) == (1, {"the response is labelled bad": 1})
    with pytest.raises(InputError, match="safer_response_id is neither 0 nor 1"):
        normalize(Dataset.from_list([PKU, {**PKU, "safer_response_id": -1}]))


# ------------------------------------------------------------------------------------------------------ named columns


def test_named_columns():
    row = {"q": "a", "good": "b", "worse_one": "c", "messages": [], "id": 3}
    found = normalize(Dataset.from_list([row]), columns=Columns("Q", "good", "worse_one")).dataset
    assert found[0] == {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    alpaca = {"instruction": "Add.", "input": "1 2", "reply": "3"}
    found = normalize(Dataset.from_list([alpaca]), columns=Columns(chosen="reply")).dataset
    assert found[0]["prompt"][0]["content"] == "Add.\n\n1 2"
    found = normalize(Dataset.from_list([{"q": "a", "response": "b"}]), columns=Columns("q")).dataset
    assert found[0]["chosen"] == "b"
    with pytest.raises(InputError) as error:
        normalize(Dataset.from_list([row]), name="mine", columns=Columns("query", "good"))
    assert "mine has no column 'query' for the prompt" in str(error.value)
    assert "--prompt_column" in str(error.value)
