"""Tests of `sails answer`: a model's own answers as rows to train on."""

import json
from pathlib import Path

import pytest

from sails_align.cli import dispatch
from sails_align.core.errors import InputError
from sails_align.data.loading import load_rows
from sails_align.data.pairs import normalize
from sails_align.evaluation.answers import rows_of
from sails_align.evaluation.options import AnswerArguments
from sails_align.evaluation.records import Completion, Prompt


def asked(text: str, *before: str) -> Prompt:
    system = [{"role": "system", "content": line} for line in before]
    return Prompt(id="0", messages=(*system, {"role": "user", "content": text}), kind="benign", category="all")


def responses(*completions: Completion) -> list[str]:
    return [row["response"] for row in rows_of([asked("Why?")] * len(completions), completions)]


def test_answers_that_are_cut_off_end_with_their_last_whole_sentence() -> None:
    cut = 'It rained.\nHe said "no!" Then he went to the'
    assert responses(Completion(cut, "stop"), Completion(cut, "length")) == [cut, 'It rained.\nHe said "no!"']
    assert responses(Completion("Version 1.5 of the", "length")) == [], "no whole sentence"
    assert responses(Completion("Do this:\n1. Boil water.\n2. Pour", "length")) == ["Do this:\n1. Boil water."]
    assert responses(Completion("Here is how:\n\n1.", "length")) == []


def test_prompts_without_an_answer_are_left_out() -> None:
    no_text = Completion(None, error="time-out")
    thinking = Completion("<think>Is it", "length")
    done = Completion("<think>It is.</think> Yes, it is. ", "stop")
    assert responses(no_text, Completion("  ", "stop"), thinking, done) == ["Yes, it is."]


def test_a_row_has_the_whole_conversation() -> None:
    (row,) = rows_of([asked("Why?", "Be brief.")], [Completion("So.", "stop")])
    assert [turn["content"] for turn in row["prompt"]] == ["Be brief.", "Why?"]
    assert (row["kind"], row["category"]) == ("benign", "all")


def test_the_file_can_be_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "new" / "own.jsonl"
    argv = ["answer", "--part", "train", "--n_prompts", "3", "--output", str(file), "--progress", "false"]
    dispatch(argv)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["harmful"] * 3 + ["benign"] * 3
    read = normalize(load_rows(str(file)), name=str(file)).dataset
    assert read["chosen"] == [row["response"] for row in rows]
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"own.jsonl is there already;\nchoose another --output, or replace it with"):
        dispatch([*argv, "--n_prompts", "2"])
    assert file.read_bytes() == before
    dispatch([*argv, "--n_prompts", "2", "--overwrite_output_dir", "true"])
    assert len(file.read_text().splitlines()) == 4


def test_another_kind_of_file_is_refused() -> None:
    with pytest.raises(InputError, match=r"own.csv; name a file that ends in .jsonl"):
        AnswerArguments(output="own.csv")
