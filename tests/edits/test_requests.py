"""Requests are those that are named, those of the run, or those that come with the model."""

import json
import shutil
from pathlib import Path

import pytest
from family import Family
from transformers import AutoTokenizer

from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.data import OF_MODELS
from sails_align.edits.options import IrrOptions, RosiOptions
from sails_align.edits.requests import find_requests, response_batches
from sails_align.edits.weights import open_weights
from sails_align.smollm2 import HUB_ID
from sails_align.testbed.build import ASSETS

TESTBED = AutoTokenizer.from_pretrained(ASSETS / "model")


@pytest.mark.parametrize("name", ["testbed", str(ASSETS), str(ASSETS / "model")])
def test_the_testbeds(name: str) -> None:
    harmful, harmless = (
        find_requests(option, RosiOptions(), Path(name), [], TESTBED)
        for option in ("dataset_name", "helpful_dataset_name")
    )
    assert all(harmful.rows["harmful"])
    assert not any(harmless.rows["harmful"])
    assert len(harmful.some(7, 0)) == 7
    assert harmful.some(7, 0)["prompt"] == harmful.some(7, 0)["prompt"] != harmful.some(7, 1)["prompt"]


@pytest.mark.parametrize("name", ["smollm2", HUB_ID])
def test_smollm2s(name: str) -> None:
    found = [rows for _, entry in OF_MODELS.items() if (rows := entry.load()(name)) is not None]
    (sides,) = found
    assert [len(rows) for rows in sides] == [79, 153]


def test_no_other_model_has_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ASSETS)  # a name is not taken for a folder beside world.json
    for name in (str(tmp_path), "gpt2", "org/model", "testbeds"):
        assert all(entry.load()(name) is None for _, entry in OF_MODELS.items())


def test_those_named_go_before_those_of_the_run_and_those_of_its_model(
    family: Family, requests: dict[str, str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(family.adapter, tmp_path / "run"))
    tokenizer, model = AutoTokenizer.from_pretrained(family.base), [open_weights(family.adapter)]
    options = {"model": {"model_name_or_path": str(ASSETS / "model")}}
    write_json(run / "run.json", {"options": options})
    assert find_requests("dataset_name", RosiOptions(), run, model, tokenizer).source == "the data of model"
    of_run = {"script": {"dataset_name": requests["dataset_name"]}, "data": {"helpful_dataset_name": "none"}}
    write_json(run / "run.json", {"options": {**options, **of_run}})
    for option in ("dataset_name", "task_dataset_name"):
        assert find_requests(option, IrrOptions(), run, model, tokenizer).source == requests["dataset_name"]
    of_task = {"script": {"dataset_name": requests["dataset_name"]}, "data": {}}
    write_json(run / "run.json", {"options": {**options, **of_task}})
    assert find_requests("task_dataset_name", IrrOptions(), run, model, tokenizer).source == requests["dataset_name"]
    assert find_requests("dataset_name", RosiOptions(), run, model, tokenizer).source == "the data of model"
    named = RosiOptions(dataset_name=requests["helpful_dataset_name"], helpful_dataset_name="testbed")
    found = find_requests("dataset_name", named, run, model, tokenizer)
    assert found.rows[0]["prompt"][0]["content"] == "how do i mend the cup 0"
    assert find_requests("helpful_dataset_name", named, run, model, tokenizer).source == "testbed"
    with pytest.raises(InputError, match=r"no harmful requests are known for .*/aligned;"):
        find_requests("dataset_name", RosiOptions(), family.aligned, [open_weights(family.aligned)], tokenizer)


def test_batches_hold_the_responses_or_all_but_padding(family: Family, requests: dict[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family.base)
    found = find_requests("dataset_name", RosiOptions(**requests), family.base, [], tokenizer)
    rows = found.with_responses("dataset_name").some(5, 0)
    responses = [json.loads(line)["response"] for line in Path(requests["dataset_name"]).read_text().splitlines()]
    (ids_BS, attention_BS, mask_BS), *others = response_batches(tokenizer, rows, 512, "x")
    assert not others
    assert all(tokenizer.decode(ids_S[mask_S]) in responses for ids_S, mask_S in zip(ids_BS, mask_BS, strict=True))
    (_, attention_BS, mask_BS), *_ = response_batches(tokenizer, rows, 512, "x", whole=True)
    assert (mask_BS == attention_BS.bool()).all()
