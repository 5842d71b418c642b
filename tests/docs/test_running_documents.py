"""Every command of the documents is run, in order, in a copy of the repository's folders, and ends with exit code 0.

Not run: blocks that say what they need (`documented.NEEDS`), and what `.ci/run` does by itself (`make ...`). Commands
are the documents' own, with more options behind them where that makes them smaller (`SMALLER`), and one that has been
run is not run again. Most commands are forks of one process (`warm`), which saves the time of imports.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from documented import DOCUMENTS, NEEDS, blocks
from paths import ROOT, SHARED
from processes import PATIENCE
from warm import Warm

TRAINING = "--max_steps 4 --max_train_examples 16 --eval_examples 4 --disable_tqdm true"
COMPARISON = "--runs base sft-sails --n_seeds 1 --n_prompts 4 --n_examples 8 --learning_rates 1e-3 --n_attacked 0"
COMPARISON += " --n_capability 0 --relearning false --processes 1 --progress false"
SMALLER = {
    r"(recipes/(sft|dpo)_sails\.py|sails (train (sft|dpo)|discover))\b": TRAINING,
    r"(recipes/rlhf_reference\.py|sails train rlhf)\b": f"{TRAINING} --warm_start_epochs 1",
    r"(recipes/compare\.py|sails compare)\b.* --examples": f"{COMPARISON} --examples 4 --n_side_seeds 1",
    r"(recipes/compare\.py|sails compare)\b(?!.*--list_cells)": COMPARISON,
    r"(eval/|sails eval )(safety|helpfulness)": "--n_prompts 4",
    r"(eval/|sails eval )harness": "--limit 4",
    r"sails judge-check": "--n_labels 12",
    r"sails attack gcg": "--n_prompts 1 --n_steps 4",
    r"sails attack": "--n_prompts 2",
    r"sails features": "--n_texts 16",
    r"sails train-sae": "--n_tokens 20000",
    r"recipes/clip_redirect\.py": "--pretraining_steps 20 --epochs 1",
    r"benchmarks/discovery\.py": "--examples 2 --repeats 1 --memory_examples 2",
    r"benchmarks/testbed_separation\.py": "--n 16",
    r"benchmarks/recovery\.py": "--seeds 2 --n 16",
}
"""Of what matches: options that make it smaller, of the first that does."""

SLOW = ("docs/comparison.md",)
"""Documents whose commands take minutes even so."""


def smaller(command: str) -> str:
    """The command with the options of `SMALLER`."""
    return " ".join([command, *[more for pattern, more in SMALLER.items() if re.search(pattern, command)][:1]])


class Copy:
    """A folder with what commands use of the repository, and the run of `make demo` in it."""

    def __init__(self, folder: Path, warm: Warm) -> None:
        self.folder, self.warm, self.done = folder / "repository", warm, set()
        for name in ("recipes", "eval", "benchmarks", "accelerate_configs", "docs"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("sails_align", "tests", "README.md", "mkdocs.yml"):
            (self.folder / name).symlink_to(ROOT / name)
        if SHARED.is_dir():
            (folder / "shared").symlink_to(SHARED)
        self.variables = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SAILS_CACHE": str(folder / "cache"),
            "HF_DATASETS_CACHE": str(folder / "datasets"),
        }

    def run(self, command: str, python: bool = False) -> None:
        """Run a command unless it has been run."""
        if command in self.done:
            return
        started = time.monotonic()
        words = ["python", "-c", command] if python else ["bash", "-c", smaller(command)]
        if not python and re.fullmatch(r"(sails|python|accelerate) [^|&;<>$*]*", words[-1]):
            words = shlex.split(words[-1])
        if words[0] == "bash":
            how: dict[str, Any] = {"cwd": self.folder, "env": os.environ | self.variables}
            done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, **how)
        else:
            done = self.warm.run(words, self.folder, self.variables)
        print(f"{time.monotonic() - started:.0f} s  {command}")
        assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        self.done.add(command)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Copy:
    copy = Copy(tmp_path_factory.mktemp("documents"), warm)
    demo = re.search(r"^demo:.*\n.*(sails train .*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert demo is not None
    copy.run(demo[1])
    return copy


@pytest.mark.documents
@pytest.mark.parametrize(
    "document", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in DOCUMENTS]
)
def test_commands_run(document: str, copy: Copy) -> None:
    for block in blocks(document):
        for command in block.commands if block.needs is None else ():
            if not command.startswith("make ") and (SHARED.is_dir() or "shared" not in command):
                copy.run(command, python=block.language == "python")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_not_run_says_what_it_needs_or_is_run_by_ci(document: str) -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for block in blocks(document):
        assert block.needs is None or NEEDS.fullmatch(block.lines[0]), block.lines[0]
        for command in block.commands:
            is_run = not command.startswith("make ") or command in ci
            assert is_run or block.needs is not None, f"{command} is not in .ci/run"


def test_every_part_of_the_table_is_used() -> None:
    commands = [
        command for name in DOCUMENTS for block in blocks(name) if block.needs is None for command in block.commands
    ]
    for pattern in SMALLER:
        assert any(re.search(pattern, command) for command in commands), f"no command is {pattern}"
