"""The Dockerfile: its files and extras are there, and where there is Docker, the image is built and works."""

import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch

import pytest
from packaging.specifiers import SpecifierSet
from paths import ROOT

LINES = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _default(argument: str) -> str:
    (line,) = (line for line in LINES if line.startswith(f"ARG {argument}="))
    return line.partition("=")[2]


def _instructions(name: str) -> list[str]:
    return [line.partition(" ")[2] for line in LINES if line.startswith(f"{name} ")]


def test_the_base_image_has_a_python_that_the_package_takes() -> None:
    found = re.match(r"python:(\d+\.\d+)-slim", _default("BASE"))
    assert found is not None
    assert SpecifierSet(PROJECT["requires-python"]).contains(found[1])


def test_the_extras_exist() -> None:
    text = (ROOT / "Dockerfile").read_text()
    named = [_default("EXTRAS"), *re.findall(r"EXTRAS=([\w,]+) \.", text)]
    assert len(named) == 2
    for extras in named:
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    copied = [name for line in _instructions("COPY") for name in line.split()[:-1] if name != "."]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert copied
    for name in copied:
        assert (ROOT / name).is_file()
        assert not any(fnmatch(name, pattern) for pattern in ignored)
    needed = [PROJECT["readme"], "pyproject.toml", "constraints.txt", "sails_align", "recipes"]
    assert not [name for name in needed if any(fnmatch(name, pattern) for pattern in ignored)]


def test_it_does_not_run_as_root() -> None:
    assert _instructions("USER") == ["sails"]
    (steps,) = (line for line in _instructions("RUN") if "useradd" in line)
    assert "useradd --create-home --uid 1000 --non-unique sails" in steps  # Ubuntu's images have a user 1000
    assert LINES.index("ENV HOME=/home/sails") == LINES.index("USER sails") + 2
    assert "writable by user 1000" in (ROOT / "docs" / "install.md").read_text()
    assert LINES.index("USER sails") > max(LINES.index(f"RUN {line}") for line in _instructions("RUN"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_is_built_and_works() -> None:
    if shutil.which("docker") is None:
        pytest.skip("there is no docker on this machine")
    pulled = subprocess.run(["docker", "pull", _default("BASE")], capture_output=True, text=True)
    if pulled.returncode != 0:
        pytest.skip(f"docker cannot get the base image: {pulled.stderr.strip()}")
    subprocess.run(["docker", "build", "-t", "sails-align:test", "."], cwd=ROOT, check=True)
    said = subprocess.run(["docker", "run", "--rm", "sails-align:test", "--version"], capture_output=True, text=True)
    assert said.stdout.split() == ["sails-align", PROJECT["version"]]
