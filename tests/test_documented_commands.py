"""Every command and YAML file that the documentation shows is one that recipes and evaluations take."""

import re
import shlex
from pathlib import Path

import pytest

from sails_align import align, attack_options
from sails_align.compare_options import read_plans
from sails_align.comparing import ReportArguments
from sails_align.comparison.jobs import names_of
from sails_align.eval_harness import HarnessArguments
from sails_align.eval_helpfulness import ReferenceArguments
from sails_align.eval_judges import JudgeArguments
from sails_align.eval_options import PromptArguments, ResponseArguments, RunArguments
from sails_align.judge_check import LabelArguments
from sails_align.training.parsing import CommandLine

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
LAUNCH = re.compile(r"(?:accelerate launch(?P<launch>.*?)|python) recipes/(?P<method>sft|dpo)_sails\.py(?P<options>.*)")

EVALUATE = re.compile(
    r"(?:\$ )?(?:python (?:eval|recipes)/|sails (?:eval )?)"
    r"(?P<name>safety|helpfulness|harness|judge-check|attack|compare|report)(?:\.py)? *"
    r"(?P<options>.*)"
)
COMMON = [ResponseArguments, PromptArguments, JudgeArguments, RunArguments]
CLASSES = {
    "safety": COMMON,
    "helpfulness": [*COMMON, ReferenceArguments],
    "harness": [HarnessArguments],
    "judge-check": [LabelArguments, JudgeArguments, RunArguments],
    "report": [ReportArguments],
}


def lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().replace("\\\n", " ").splitlines()]


def commands(path: Path) -> list[tuple[list[str], str, list[str]]]:
    """Of each command: the options of accelerate, the method, and the recipe's options."""
    found = [
        match for line in lines(path) if (match := LAUNCH.match(line)) and "FILE" not in line and "DIR" not in line
    ]
    return [
        (shlex.split(match["launch"] or ""), match["method"], shlex.split(match["options"], comments=True))
        for match in found
    ]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_commands(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for launch, method, options in commands(ROOT / path):
        if "--config_file" in launch:
            assert (ROOT / launch[launch.index("--config_file") + 1]).is_file()
        args = align.parse(method, options)  # pyright: ignore[reportArgumentType]
        if "--model_name_or_path" in options:
            assert args.model.model_name_or_path == options[options.index("--model_name_or_path") + 1]


def evaluations(path: Path) -> list[tuple[str, list[str]]]:
    found = [match for line in lines(path) if (match := EVALUATE.match(line)) and "|" not in line]
    return [(match["name"], shlex.split(match["options"], comments=True)) for match in found]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_evaluations(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, options in evaluations(ROOT / path):
        if name == "attack":
            assert attack_options.parse(options, "sails attack").method == options[0]
        elif name == "compare":
            args, studies = read_plans(CommandLine.read(options), None)
            assert set(args.cell or ()) <= set(names_of(studies))
        else:
            CommandLine.read(options).parse(CLASSES[name])


def test_commands_are_found() -> None:
    found = {path: commands(ROOT / path) for path in DOCUMENTS}
    assert found["README.md"]
    assert any(launch for path in found for launch, _, _ in found[path])
    assert {name for path in DOCUMENTS for name, _ in evaluations(ROOT / path)} == {*CLASSES, "attack", "compare"}
    assert {method for path in found for _, method, _ in found[path]} == {"sft", "dpo"}


def test_yaml(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "config.yaml").write_text(block)
        args = align.parse("sft", ["--config", str(tmp_path / "config.yaml")])
        assert args.sails.preset == "paper"
        assert args.sails.contrast == "both"
        assert args.sails.top_k == 64
