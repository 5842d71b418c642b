"""Every command and YAML file that the documentation shows for the recipe is one that it takes."""

import re
import shlex
from pathlib import Path

import pytest

from sails_align import align

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "accelerate launch recipes/sft_sails.py"


def commands(path: Path) -> list[str]:
    """What follows the recipe's name, where that is not a synopsis."""
    lines = [line.strip() for line in path.read_text().replace("\\\n", " ").splitlines()]
    return [line.removeprefix(RECIPE) for line in lines if line.startswith(RECIPE) and "OPTIONS" not in line]


@pytest.mark.parametrize("path", ["README.md", "docs/recipes.md"])
def test_commands(path: str) -> None:
    found = commands(ROOT / path)
    assert found
    for command in found:
        args = align.parse("sft", shlex.split(command, comments=True))
        assert args.model.model_name_or_path in command


def test_yaml(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "config.yaml").write_text(block)
        args = align.parse("sft", ["--config", str(tmp_path / "config.yaml")])
        assert args.sails.preset == "paper"
        assert args.sails.contrast == "both"
        assert args.sails.top_k == 64
