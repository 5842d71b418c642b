"""What is read of folders with responses, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from viewed_runs import FIRST, PROMPTS, SECOND, make_compared, make_run

from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.evaluation.output import read_rows, write_rows
from sails_align.reporting.viewer.runs import read_runs


def test_an_evaluation_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = make_run(tmp_path / "run", SECOND, name="m")
    (run,) = read_runs(tmp_path / "run")
    assert run.name == "m"
    assert tuple(run.prompts) == result.prompts
    assert tuple(run.responses) == result.responses
    assert run.verdicts == result.verdicts  # also of the two prompts of the same id
    assert run.rates == result.rates()


def test_a_compared_folder_has_two_models_the_other_one_first(tmp_path: Path) -> None:
    make_compared(tmp_path)
    base, trained = read_runs(tmp_path)
    assert (base.name, trained.name) == ("base", "runs/trained")
    assert (list(base.responses), list(trained.responses)) == (FIRST, SECOND)
    (tmp_path / "comparison.json").unlink()  # as an evaluation without --compare does
    assert [run.name for run in read_runs(tmp_path)] == ["runs/trained"]


def test_two_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_run(tmp_path / name)
    assert [run.name for run in read_runs(tmp_path / "one", tmp_path / "two")] == [
        str(tmp_path / "one"),
        str(tmp_path / "two"),
    ]


def test_an_evaluation_that_is_not_judged_yet(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "verdicts.jsonl").unlink()
    (run,) = read_runs(tmp_path)
    assert (run.verdicts, run.rates, len(run.responses)) == ({}, {}, len(PROMPTS))


def row(model: str, split: str, response: str, **values: Any) -> dict[str, Any]:
    about = {"prompt": f"what is {split}?", "category": "c", "harmful": split == "harmful"}
    about |= {"score": None, "refused": False, "correct": False, "reason": None}
    return {"model": model, "split": split, **about, "response": response, **values}


def test_a_training_has_the_model_before_and_after(tmp_path: Path) -> None:
    rows = [
        row(model, *values)
        | ({"score": score} if values[0] == "harmful" else {"refused": score == 1, "correct": score > 1})
        for model, score in (("base", 5), ("trained", 1))
        for values in (("harmful", "yes"), ("dual_use", "no"), ("benign", "maybe"))
    ]
    rows[-1] |= {"response": "", "reason": "empty response"}
    write_rows(tmp_path / "responses.jsonl", rows)
    safe = {"value": 1.0, "ci_low": 0.2, "ci_high": 1.0, "n": 1, "n_unscored": 0}
    write_json(tmp_path / "metrics.json", {"base": {"held_out_loss": 1.0}, "trained": {"safety_rate": safe}})
    base, trained = read_runs(tmp_path)
    assert [prompt.kind for prompt in base.prompts] == ["harmful", "dual_use", "benign"]
    assert (base.verdicts["harm"]["vote"][0].score, trained.verdicts["harm"]["oracle"][0].score) == (5.0, 1.0)
    assert trained.verdicts["refusal"]["vote"][1].score == 1.0
    assert trained.verdicts["correctness"]["vote"][2].reason == "empty response"
    assert (base.rates, trained.rates["safety_rate"].value) == ({}, 1.0)


def damaged(name: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def test_lines_are_those_of_the_file_and_not_of_the_texts(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028two\x85three\x1cfour"}, {"text": "five"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "responses.jsonl").unlink(), "has no responses.jsonl"),
        (damaged("responses.jsonl", lambda text: ""), "responses.jsonl is empty"),
        (damaged("responses.jsonl", lambda text: text[:-50]), "line 9 is no JSON"),
        (damaged("responses.jsonl", lambda text: "[1]\n" + text), "line 1 is no JSON object"),
        (damaged("responses.jsonl", lambda text: text.replace('"harmful"', '"evil"', 1)), "row 1 .* kind is 'evil'"),
        (damaged("responses.jsonl", lambda text: text.replace('"category"', '"c"', 1)), "row 1 .*KeyError: 'category'"),
        (damaged("responses.jsonl", lambda text: '{"a": 1}\n'), "neither of an evaluation nor of a training"),
        (damaged("verdicts.jsonl", lambda text: text.split("\n", 1)[1]), "verdicts on harm by grader are not of"),
        (damaged("verdicts.jsonl", lambda text: text.replace("1.0", "NaN", 1)), "the score is nan"),
        (damaged("verdicts.jsonl", lambda text: text.replace('"harm"', '"x"', 1)), "there is no task 'x'"),
        (damaged("verdicts.jsonl", lambda text: text.replace('"vote"', '"v"')), "there is no vote on harm"),
        (damaged("metrics.json", lambda text: "{"), "cannot read .*metrics.json"),
        (damaged("metrics.json", lambda text: text.replace('"ci_low"', '"low"')), "its rates cannot be read"),
        (lambda folder: (folder / "responses.jsonl").write_bytes(b"\xff"), "cannot read .*responses.jsonl"),
    ],
)
def test_what_is_missing_or_damaged(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    make_run(tmp_path, SECOND)
    damage(tmp_path)
    with pytest.raises(InputError, match=says) as error:
        read_runs(tmp_path)
    assert len(str(error.value).splitlines()) <= 3


def test_a_compared_model_without_responses(tmp_path: Path) -> None:
    make_compared(tmp_path)
    (tmp_path / "compared" / "responses.jsonl").unlink()
    with pytest.raises(InputError, match=r"compared has no responses.jsonl"):
        read_runs(tmp_path)
    (tmp_path / "comparison.json").write_text(json.dumps([]))
    with pytest.raises(InputError, match="it is no JSON object"):
        read_runs(tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "eval-safety")
    with pytest.raises(InputError, match=r"there is no folder .*eval-safty; did you mean '.*eval-safety'"):
        read_runs(tmp_path / "eval-safty")
