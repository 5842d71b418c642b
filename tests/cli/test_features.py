"""`sails features`: what it says of a run's features is what the model, the SAEs and the data say."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import Project

from sails_align.cli import features as explaining
from sails_align.core.errors import InputError
from sails_align.training import run as align
from sails_align.training.features import FEATURES_FILE


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training on the testbed; do not change it."""
    folder = tmp_path_factory.mktemp("explained") / "run"
    options = ["--max_train_examples", "64", "--num_train_epochs", "2", "--eval_examples", "8", "--output_dir"]
    align.main("sft", [*options, str(folder), "--save_strategy", "no", "--disable_tqdm", "true"])
    return folder


def test_features_of_the_testbed_are_concepts_of_harm(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = explaining.main(["--run", str(run), "--n_texts", "64"])
    assert json.loads((run / "features.json").read_text()) == json.loads(json.dumps(found))
    best = found["layers"]["3"]
    assert best["precision"] > best["precision_of_random"]
    first = best["features"][0]
    assert first["harmful_before"] > first["harmless_before"]
    changed = [feature["harmful_before"] != feature["harmful_after"] for feature in best["features"]]
    assert any(changed)  # the adapter is in block 3
    assert all(feature["harmful_before"] == feature["harmful_after"] for feature in found["layers"]["1"]["features"])
    assert found["drift"] == json.loads((run / "metrics.json").read_text())["drift"]
    assert 0 < found["drift"]["adapter_energy_inside"] <= 1
    told = next(of for of in found["meanings"] if (of["layer"], of["id"]) == (3, first["id"]))
    assert len(told["promoted"]) == 6
    printed = capsys.readouterr().out
    assert f"3, {first['id']}" in printed
    assert "features.json" in printed


def test_it_reads_and_leaves_the_run_as_it_is(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    before = {path.name for path in copy.iterdir()} | {FEATURES_FILE}
    weights = load_file(copy / "adapter_model.safetensors")
    explaining.main(["--run", str(copy), "--n_texts", "4"])
    after = load_file(copy / "adapter_model.safetensors")
    assert {path.name for path in copy.iterdir()} == before
    assert all(bool((after[name] == weights[name]).all()) for name in weights)


def test_any_model_with_saes_and_data(project: Project, tmp_path: Path) -> None:
    align.main("dpo", project.argv(tmp_path / "run", "--helpful_ratio", "0"))
    found = explaining.main(["--run", str(tmp_path / "run"), "--n_texts", "8"])
    told = {(of["layer"], of["id"]) for of in found["meanings"]}
    shown = {(int(layer), of["id"]) for layer, values in found["layers"].items() for of in values["features"]}
    assert told == shown
    assert shown


def test_what_has_no_features(run: Path, project: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run of sails train sft or dpo"):
        explaining.main(["--run", str(tmp_path)])
    align.main("sft", project.argv(tmp_path / "pca", "--init", "activation_pca"))
    with pytest.raises(InputError, match="was not made of SAE features; give a run with --init sails"):
        explaining.main(["--run", str(tmp_path / "pca")])
    align.main("sft", project.argv(tmp_path / "plain", "--init", "default"))
    with pytest.raises(InputError, match="was not initialized in a subspace; pass a run with --init sails"):
        explaining.main(["--run", str(tmp_path / "plain")])


def test_a_run_is_not_looked_at_with_other_saes(run: Path, project: Project, tmp_path: Path) -> None:
    align.main("sft", project.argv(tmp_path / "run"))
    before = (tmp_path / "run" / "subspace" / "subspace.json").read_text()
    weights = next(Path(project.folder / "saes").rglob("sae_weights.safetensors"))
    kept = weights.read_bytes()
    save_file({name: value + 0.01 for name, value in load_file(weights).items()}, weights)
    try:
        with pytest.raises(InputError, match=r"the SAEs in config.yaml of .* changed since training"):
            explaining.main(["--run", str(tmp_path / "run")])
    finally:
        weights.write_bytes(kept)
    assert (tmp_path / "run" / "subspace" / "subspace.json").read_text() == before
    assert not (tmp_path / "run" / FEATURES_FILE).exists()
