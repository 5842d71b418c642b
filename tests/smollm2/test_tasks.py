"""The task of common knowledge that comes with SmolLM2."""

import csv
from pathlib import Path

import pytest

from sails_align.cli.evaluate import harness
from sails_align.smollm2.requests import DATA


def test_each_question_has_four_different_answers() -> None:
    with (DATA / "common_knowledge.csv").open(encoding="utf-8", newline="") as file:
        _, *rows = list(csv.reader(file))
    assert len({question for question, *_ in rows}) == len(rows) == 120
    assert all(len(row) == 5 and len(set(row[1:])) == 4 and all(row) for row in rows)


def test_lm_eval_runs_it(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    options = ["--tasks", "common_knowledge", "--base", "none", "--output_dir", str(tmp_path)]
    score = harness(options)["tasks"]["common_knowledge"]["acc,none"]["model"]
    assert score["n"] == 120
    assert score["value"] < 0.5, "the testbed's model knows none of the words"
