"""The testbed's capability tasks: right by the oracle, held out, the same for the same arguments."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sails_align.core.errors import InputError
from sails_align.testbed.oracle import judge_response
from sails_align.testbed.prompts import HARMLESS
from sails_align.testbed.tasks import CHANCE, GROUP, N_CHOICES, WHOLE_ANSWER, write_tasks
from sails_align.testbed.world import World, WorldConfig

WORLD = World(WorldConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    assert set(write_tasks(WORLD, folder, n=60)) == set(CHANCE)
    return folder


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_the_files_are_the_same_again_and_others_for_another_seed(folder: Path, tmp_path: Path) -> None:
    write_tasks(WORLD, tmp_path / "again", n=60)
    write_tasks(WORLD, tmp_path / "other", n=60, seed=1)
    for name in CHANCE:
        text = (folder / f"{name}.jsonl").read_text()
        assert (tmp_path / "again" / f"{name}.jsonl").read_text() == text
        assert (tmp_path / "other" / f"{name}.jsonl").read_text() != text
        assert len(rows(folder, name)) == 60


def test_requests_are_harmless_and_of_the_test_split(folder: Path) -> None:
    test, train = (
        {request.prompt for split in splits for request in WORLD.requests(split)}
        for splits in ([f"test_{name}" for name in HARMLESS], ["train_benign", "train_harmful"])
    )
    asked = {row["prompt"] for name in ("testbed_answers", "testbed_choice") for row in rows(folder, name)}
    assert asked <= test
    assert not asked & train


def test_the_oracle_agrees_with_the_exact_match(folder: Path) -> None:
    """Of right answers, wrong ones, refusals, and answers beside a refusal."""
    requests = {request.prompt: request for name in HARMLESS for request in WORLD.requests(f"test_{name}")}
    seen = set()
    for row in rows(folder, "testbed_answers"):
        request = requests[row["prompt"]]
        wrong = request.answer.replace(row["answer"], "torch at the mill")
        for response in (request.answer, wrong, request.refusal, f"{request.refusal} {request.answer}"):
            found = re.findall(WHOLE_ANSWER, response)
            is_match = found == [row["answer"]]
            assert is_match == judge_response(WORLD, request, response, "correctness").score
            seen.add(is_match)
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["testbed_choice", "testbed_facts"])
def test_one_choice_is_right_and_its_place_does_not_tell(folder: Path, name: str) -> None:
    items = rows(folder, name)
    assert {len(set(row["choices"])) for row in items} == {N_CHOICES}
    places = [row["answer"] for row in items]
    assert max(places.count(place) for place in range(N_CHOICES)) < len(items) / 2
    for row in items:
        thing = next(thing for thing in WORLD.things.values() if thing.name in row["prompt"].replace("?", "").split(" ")
                     or f"{thing.name}." in row["prompt"])  # fmt: skip
        right = row["choices"][row["answer"]]
        if name == "testbed_facts":
            truths = {
                f"the {thing.name} is a {thing.kind}.",
                f"it is {thing.color}.",
                f"it is kept at the {thing.place}.",
            }
            assert truths & set(row["choices"]) == {right}
        else:
            assert right.endswith(f"at the {thing.place}.")


def test_yaml_is_what_lm_eval_reads(folder: Path) -> None:
    assert yaml.safe_load((folder / f"{GROUP}.yaml").read_text()) == {"group": GROUP, "task": list(CHANCE)}
    for name, chance in CHANCE.items():
        config = yaml.safe_load((folder / f"{name}.yaml").read_text())
        assert config["task"] == name
        assert config["metadata"]["chance"] == chance
        assert Path(config["dataset_kwargs"]["data_files"]["test"]).is_absolute()


def test_too_many_items_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ask for fewer"):
        write_tasks(WORLD, tmp_path, n=10**6)
