"""The stages of a training on a tiny model: what starts it, what is skipped, what is resumed and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import SAE_LAYERS, Project, build, distance

from sails_align.core.errors import InputError
from sails_align.subspace import discovery as subspaces
from sails_align.subspace.basis import Subspace
from sails_align.training import run as align
from sails_align.training.subspace import find_subspace


@pytest.fixture(scope="module")
def finished(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory; do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    align.main("sft", project.argv(folder))
    return folder


# What is not done twice


def test_discovery_is_skipped_on_the_same_inputs(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    load_truncated = subspaces.load_truncated  # once for each discovery

    def recorded(*args: Any, **kwargs: Any) -> Any:
        found.append("again")
        return load_truncated(*args, **kwargs)

    monkeypatch.setattr(subspaces, "load_truncated", recorded)
    folder, overwrite = tmp_path / "subspace", ("--overwrite_output_dir", "true")

    def find(*more: str) -> Subspace:
        args = align.parse("sft", project.argv(tmp_path, *more))
        args, testbed = align.resolved(args)
        source = align.load_source(args, testbed)
        return find_subspace(args, source, folder)

    first = find()
    assert found == ["again"]
    written = (folder / "subspace.safetensors").stat().st_mtime_ns
    assert distance(find().bases, first.bases) == 0  # pyright: ignore[reportArgumentType]
    find("--learning_rate", "0.5", "--fold_norm", "true")  # nothing that discovery depends on
    assert found == ["again"]
    assert (folder / "subspace.safetensors").stat().st_mtime_ns == written
    changes = (["--top_k", "4"], ["--contrast", "response"], ["--max_train_examples", "20"], ["--max_length", "30"])
    for n, change in enumerate(changes, 2):
        with pytest.raises(InputError, match=r"holds another subspace \(different: "):
            find(*change)
        find(*change, *overwrite)
        assert len(found) == n, change
    model = Path(shutil.copytree(project.folder / "tiny", tmp_path / "tiny"))
    weights = load_file(model / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"})
    find("--model_name_or_path", str(model), *overwrite)
    assert len(found) == len(changes) + 2
    find(*overwrite)
    assert len(found) == len(changes) + 3


def test_no_helpful_data_no_prompt_contrast(project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    argv = project.argv(tmp_path)
    at = argv.index("--helpful_dataset_name")
    del argv[at : at + 2]
    built = build(argv)
    assert built.subspace is not None
    assert built.subspace.provenance["features"]["contrast"] == "response"
    assert built.subspace.provenance["options"]["contrast"] == "response"
    assert "--contrast response" in caplog.text
    assert "all blocks have adapters" in caplog.text
    for given in (["--contrast", "both"], ["--contrast", "split"], ["--benign_whitening", "true"]):
        with pytest.raises(InputError, match="helpful_dataset_name"):
            build([*argv, *given])
    with pytest.raises(InputError, match=r"layer_map is from_onset.*no harmless prompts"):
        build([*argv, "--layer_map", "from_onset"])


# What is left out


def test_examples_that_do_not_fit_are_counted(
    project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"prompt": "how do i break " + "the lock " * 20, "chosen": "sorry no", "rejected": "you can"}
    rows = (project.folder / "safety.jsonl").read_text() + 10 * (json.dumps(long) + "\n")
    (tmp_path / "long.jsonl").write_text(rows)
    metrics = align.main("sft", project.argv(tmp_path / "run", "--dataset_name", str(tmp_path / "long.jsonl")))
    n_left_out = metrics["provenance"]["longer_than_max_length"]
    assert n_left_out["training"] + n_left_out["held-out"] == 10
    assert f"of {n_left_out['training']} of 92 training examples fill max_length 32" in caplog.text
    no_data = ["--init", "random_basis", "--layer_map", "nearest", "--benign_whitening", "false"]
    with pytest.raises(InputError, match="fill max_length 6: no response is left"):
        build(project.argv(tmp_path / "none", *no_data, "--max_length", "6"))


def test_a_diverged_training_says_so(project: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nan: training diverged; choose a smaller --learning_rate"):
        align.main("sft", project.argv(tmp_path, "--init", "random_basis", "--learning_rate", "1e30"))
    assert not (tmp_path / "metrics.json").exists()


# What is left behind


def test_the_run_directory(project: Project, finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "run.json", "metrics.json", "subspace"} <= names
    assert {"checkpoint-4", "checkpoint-6"} <= names
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["base"].keys() == metrics["trained"].keys() == {"held_out_loss"}
    assert metrics["trained"]["held_out_loss"] < metrics["base"]["held_out_loss"]
    run = json.loads((finished / "run.json").read_text())
    assert run["identity"] == metrics["provenance"]["identity"]
    assert run["options"]["sails"]["top_k"] == 8
    subspace = Subspace.load(finished / "subspace")
    assert list(subspace.bases) == list(SAE_LAYERS)
    assert metrics["provenance"]["saes"].keys() == {"0", "1"}
