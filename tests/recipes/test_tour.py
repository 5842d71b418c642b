"""The tour runs from its first cell to its last, and what it says follows from what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import RECIPES, ROOT

pytestmark = pytest.mark.slow

TOUR = RECIPES / "tour.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "130", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, str(TOUR), *options], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def toured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("tour") / "out"
    ended = run("--output_dir", str(folder))
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder, ended.stdout


def test_each_step_says_what_to_notice(toured: tuple[Path, str]) -> None:
    folder, printed = toured
    noticed = [line for line in printed.splitlines() if line.startswith("-> ")]
    cells = TOUR.read_text().split("\n# ## ")
    assert len(cells) == 7  # an introduction and six steps
    assert all("notice(" in cell for cell in cells[1:])
    assert len(noticed) == TOUR.read_text().count("\nnotice(")
    assert b"<svg" in (folder / "steering.svg").read_bytes()
    assert (folder / "run" / "adapter_model.safetensors").is_file()


def test_the_numbers(toured: tuple[Path, str]) -> None:
    folder, printed = toured
    tour = json.loads((folder / "tour.json").read_text())
    discovered = tour["discovered"]
    assert max(discovered["separation"].values()) > 2
    assert tour["harm_words_promoted"][str(discovered["best_feature"])] >= 3
    assert tour["initialized"]["largest_logit_difference"] == 0
    assert tour["initialized"]["largest_delta_weight"] == 0
    plain, by_feature, by_random, *_ = tour["steering"]["test"].values()
    assert plain["harmful_refused"] == 0
    # The feature is one of what the base refuses, not any direction of its size.
    assert by_feature["harmful_refused"] > by_random["harmful_refused"] + 0.15
    assert by_feature["harmful_refused"] > by_feature["harmless_refused"]
    assert f"{100 * by_feature['harmful_refused']:.0f}% of harmful requests" in printed
    trained = tour["trained"]["trained"]
    assert trained["safety_rate_in_distribution"]["value"] > 0.9
    assert trained["correct_answer_rate"]["value"] > 0.8
    # The model loaded from the run answers as the one in training did.
    refused = tour["ablation"]["trained"]["harmful_not_helped"]
    assert refused == pytest.approx(trained["safety_rate"]["value"], abs=0.02)
    assert tour["ablation"]["trained, subspace removed"]["harmful_refused"] < refused
    assert 0 < tour["changed"]["drift"]["adapter_energy_inside"] <= 1
    assert all(value != 0 for value in tour["changed"]["activation_on_harmful"].values())


def test_another_seed_does_not_go_into_the_same_folder(toured: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = toured
    before = (folder / "tour.json").read_bytes()
    ended = run("--seed", "1", "--output_dir", str(folder))
    assert ended.returncode == 2
    assert "holds another run (different: data, seed (0, now 1))" in ended.stderr
    assert (folder / "tour.json").read_bytes() == before
    (tmp_path / "file").write_text("")
    ended = run("--output_dir", str(tmp_path / "file"))
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
