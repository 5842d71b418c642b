"""What the wheel and the source distribution hold, and what the package says of itself."""

import ast
import email
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from paths import RECIPES, ROOT

from sails_align.cli import COMMANDS
from sails_align.cli.choices import KINDS
from sails_align.data.tokens import TEMPLATES, read_chat_template

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "results")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and source distribution, built by the setuptools that is here, of a folder in which other things lie."""
    source = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(ROOT, source, ignore=LEFT_OUT, symlinks=True)
    for name in ("runs/sft/adapter_model.safetensors", "sails_align/__pycache__/x.pyc", "tests/__pycache__/x.pyc"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("not to be packed")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source.parent / "dist")]
    ended = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    (wheel,) = (source.parent / "dist").glob("*.whl")
    (archive,) = (source.parent / "dist").glob("*.tar.gz")
    return wheel, archive


@pytest.mark.wheel
def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        info = {name.partition(".dist-info/")[2] for name in file.namelist()} - {""}
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "sails_align").rglob("*") if path.is_file()}
    assert names == {name for name in tracked if "__pycache__" not in name}
    assert {"sails_align/py.typed", "sails_align/testbed/assets/model/model.safetensors"} <= names
    assert {"sails_align/data/templates/human_assistant.jinja", "sails_align/testbed/judge_attacks.jsonl"} <= names
    assert {"licenses/LICENSE", "entry_points.txt", "METADATA"} <= info
    assert built[0].stat().st_size < 10e6


@pytest.mark.wheel
def test_the_source_distribution_holds_what_a_checkout_does(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"LICENSE", "constraints.txt", "Makefile", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"} <= names
    assert {"recipes/tour.py", "recipes/configs/gemma-2-9b/sft_sails.yaml", "eval/safety.py"} <= names
    assert {"recipes/templates/human_assistant.jinja", "accelerate_configs/zero3.yaml", "docs/method.md"} <= names
    assert {"tests/conftest.py", "tests/tiny.py", "tests/steering/test_hook.py"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("runs", ".venv", "build"))]


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(file.read(name))


@pytest.mark.wheel
def test_what_it_says_of_itself(built: tuple[Path, Path]) -> None:
    said = metadata(built[0])
    assert (said["Name"], said["Version"], said["License-Expression"]) == (
        "sails-align",
        PROJECT["version"],
        "Apache-2.0",
    )
    assert said["Author"] == "The sails-align authors"
    assert said["Requires-Python"] == ">=3.11"
    extras = set(said.get_all("Provides-Extra") or ())
    assert extras == set(PROJECT["optional-dependencies"]) >= {"deepspeed", "vllm", "harness", "inspect", "dev", "all"}
    requirements = [Requirement(text) for text in said.get_all("Requires-Dist") or ()]
    core = {of.name for of in requirements if of.marker is None}
    assert core == {Requirement(text).name for text in PROJECT["dependencies"]}
    with zipfile.ZipFile(built[0]) as file:
        (name,) = (name for name in file.namelist() if name.endswith("entry_points.txt"))
        assert "sails = sails_align.cli:main" in file.read(name).decode()


def imported() -> set[str]:
    """Top-level modules that the package imports."""
    names = []
    for path in (ROOT / "sails_align").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names += [of.name for of in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
    return {name.partition(".")[0] for name in names} - {"sails_align"} - set(sys.stdlib_module_names)


def test_every_library_that_is_imported_is_asked_for() -> None:
    asked = {Requirement(text).name for of in PROJECT["optional-dependencies"].values() for text in of}
    asked |= {Requirement(text).name for text in PROJECT["dependencies"]}
    modules = {"lm_eval": "lm-eval", "sae_lens": "sae-lens", "yaml": "pyyaml", "inspect_ai": "inspect-ai"}
    names = {modules.get(module, module.replace("_", "-")) for module in imported()}
    assert {"torch", "trl", "rich"} <= names
    # These come with others that are asked for: tokenizers with transformers.
    assert names - asked <= {"tokenizers"}, names - asked


def test_templates_have_names() -> None:
    assert read_chat_template("human_assistant") == (TEMPLATES / "human_assistant.jinja").read_text()
    recipes = RECIPES / "templates" / "human_assistant.jinja"
    assert read_chat_template(str(recipes)) == read_chat_template("human_assistant")


def test_the_changelog_names_commands_that_exist() -> None:
    named = set(re.findall(r"`sails ([a-z -]+?)`", (ROOT / "CHANGELOG.md").read_text()))
    assert len(named) > 5
    groups = {name.split()[0] for name in COMMANDS.names()}
    assert named <= {*COMMANDS.names(), *groups, *(f"list {kind}" for kind in KINDS)}
