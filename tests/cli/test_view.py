"""`sails view`: pages of evaluations and trainings, with the features of a run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Project
from viewed_runs import FIRST, PROMPTS, SECOND, make_run

from sails_align.cli import view
from sails_align.cli.evaluate import safety
from sails_align.core.errors import InputError
from sails_align.models.hooks import capture
from sails_align.subspace.basis import Subspace
from sails_align.training import features
from sails_align.training import run as align


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    assert found is not None
    return json.loads(found[1])


def test_two_folders_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "one", name="first")
    make_run(tmp_path / "two", SECOND[:-1], PROMPTS[:-1], name="second")
    assert view.main([str(tmp_path / "one")]) == tmp_path / "one" / "view.html"
    output = tmp_path / "pages" / "both.html"
    view.main([str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(output)])
    assert data_of(output)["names"] == ["first", "second"]
    printed = capsys.readouterr().out
    assert "1 only of first" in printed
    assert str(output) in printed


def make_sails_run(folder: Path, provenance: dict[str, Any]) -> Path:
    (folder / "subspace").mkdir(parents=True)
    (folder / "subspace" / "subspace.json").write_text(json.dumps({"provenance": provenance}))
    return folder


def test_it_says_how_to_show_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sails = make_sails_run(tmp_path / "sails", {"features": {"layers": {}}})
    other = make_sails_run(tmp_path / "mean-difference", {})
    for model, is_told in ((sails, True), (other, False), (tmp_path / "none", False)):
        evaluation = make_run(tmp_path / f"eval-{model.name}", name=str(model))
        view.main([str(tmp_path / f"eval-{model.name}")])
        assert (f"add --features {sails} " in capsys.readouterr().out) == is_told, evaluation
    (sails / "subspace" / "subspace.json").write_text("{")
    view.main([str(tmp_path / "eval-sails")])
    assert "--features" not in capsys.readouterr().out


def test_what_cannot_be_used(tmp_path: Path) -> None:
    make_run(tmp_path / "one", FIRST[:3], PROMPTS[:3])
    make_run(tmp_path / "two", FIRST[3:], PROMPTS[3:])
    with pytest.raises(InputError, match="have no prompt in common"):
        view.main([str(tmp_path / "one"), str(tmp_path / "two")])
    assert not (tmp_path / "one" / "view.html").exists()
    with pytest.raises(InputError, match=r"name a file that ends in \.html"):
        view.main([str(tmp_path / "one"), "--output", str(tmp_path / "one" / "responses.jsonl")])
    with pytest.raises(InputError, match="there is no folder"):
        view.main([str(tmp_path / "none")])
    with pytest.raises(InputError, match="the following arguments are required: run"):
        view.main([])


def test_a_training_on_the_testbed(tmp_path: Path) -> None:
    options = ["--max_train_examples", "16", "--max_steps", "2", "--eval_examples", "4", "--save_strategy", "no"]
    align.main("sft", [*options, "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true"])
    path = view.main([str(tmp_path / "run"), "--features", str(tmp_path / "run"), "--progress", "false"])
    data = data_of(path)
    assert data["names"] == ["base", "trained"]
    assert len(data["rows"]) == 16
    assert {judge for row in data["rows"] for run in row["runs"] for _, judge, *_ in run["verdicts"]} == {"oracle"}
    chosen = Subspace.load(tmp_path / "run" / "subspace").provenance["features"]["layers"]
    shown = [(layer, id_) for row in data["rows"] for layer, id_, *_ in row["features"]]
    assert shown
    assert all(id_ in chosen[str(layer)]["ids"] for layer, id_ in shown)
    safety(["--n_prompts", "2", "--output_dir", str(tmp_path / "eval"), "--cache_path", str(tmp_path / "c.sqlite")])
    path = view.main([str(tmp_path / "eval"), "--features", str(tmp_path / "run")])
    assert any(row["features"] for row in data_of(path)["rows"])


def test_features_are_those_of_the_base_model_at_the_last_token(project: Project, tmp_path: Path) -> None:
    align.main("sft", project.argv(tmp_path / "run", "--max_steps", "1"))
    requests = [[{"role": "user", "content": text}] for text in ("Hello there", "How?", "Hello there " * 500)]
    found = features.active_features(tmp_path / "run", requests, n=1000, progress=False)
    assert set(found) == {0, 1}  # the last one is longer than max_length
    opened = features._opened(tmp_path / "run")
    model, tokenizer = features._base_model(opened.options, opened.source), opened.source.tokenizer
    for place in found:
        encoded: Any = tokenizer.apply_chat_template(
            requests[place], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        for layer, about in opened.subspace.provenance["features"]["layers"].items():
            with capture(model, [int(layer)]) as hidden, torch.no_grad():
                model(**encoded)
            acts = opened.saes[int(layer)].encode(hidden[int(layer)][0, -1:])[0]
            expected = {id_: acts[id_].item() for id_ in about["ids"] if acts[id_] > 0}
            told = {id_: act for of, id_, act, _ in found[place] if of == int(layer)}
            assert told == pytest.approx(expected, rel=1e-4)
        activations = [act for _, _, act, _ in found[place]]
        assert activations == sorted(activations, reverse=True)
    (words,) = {words for _, _, _, words in found[0][:1]}
    assert words
