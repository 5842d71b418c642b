"""Every command and YAML file that the documentation shows is one that recipes and evaluations take.

`test_running_documents.py` runs those that can be run here; this is of all, those with `# needs: ...` included.
"""

import fnmatch
import re
import shlex
from pathlib import Path

import pytest
from documented import DOCUMENTS, blocks
from paths import ROOT

from sails_align.cli.train_sae import SAEArguments
from sails_align.core.command_line import CommandLine
from sails_align.evaluation.attacks.parse import parse as parse_attack
from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.judges.options import JudgeArguments, LabelArguments
from sails_align.evaluation.options import (
    ComparedArguments,
    DivergenceArguments,
    PromptArguments,
    ReferenceArguments,
    ResponseArguments,
    RunArguments,
    TrackerArguments,
)
from sails_align.experiments.options import ReportOptions
from sails_align.experiments.results import Results, names_of
from sails_align.experiments.studies import read_plans
from sails_align.saes.options import SAETrainingOptions
from sails_align.steering.options import SteeringOptions
from sails_align.training import run as align

LAUNCH = re.compile(
    r"(?:(?:accelerate launch(?P<launch>.*?)|python) recipes/|sails train )(?P<method>sft|dpo)(?:_sails\.py)?"
    r"(?P<options>.*)"
)

EVALUATE = re.compile(
    r"(?:python (?:eval|recipes)/|sails (?:eval )?)"
    r"(?P<name>safety|helpfulness|divergence|harness|judge-check|attack|compare|report|train-sae)(?:\.py)? *"
    r"(?P<options>.*)"
)
COMMON = [ResponseArguments, PromptArguments, JudgeArguments, RunArguments]
CLASSES = {
    "safety": [*COMMON, ComparedArguments, TrackerArguments, SteeringOptions],
    "helpfulness": [*COMMON, ReferenceArguments, ComparedArguments, TrackerArguments, SteeringOptions],
    "divergence": [ResponseArguments, PromptArguments, RunArguments, DivergenceArguments],
    "harness": [HarnessArguments],
    "judge-check": [LabelArguments, JudgeArguments, RunArguments],
    "report": [ReportOptions],
    "train-sae": [SAEArguments, SAETrainingOptions],
}


def lines(document: str) -> list[str]:
    """The commands of a document, with the values of the variables that it exports before them."""
    values: dict[str, str] = {}
    found = []

    def value(match: re.Match[str]) -> str:
        return values.get(match[1], match[0])

    for line in (line for block in blocks(document) if block.language != "python" for line in block.commands):
        text = re.sub(r"\$([A-Z]+)", value, line)
        if text.startswith("export "):
            values.update(word.split("=", 1) for word in shlex.split(text)[1:])
        found.append(text)
    return found


def commands(document: str) -> list[tuple[list[str], str, list[str]]]:
    """Of each command: the options of accelerate, the method, and the recipe's options."""
    found = [match for line in lines(document) if (match := LAUNCH.match(line))]
    return [(shlex.split(match["launch"] or ""), match["method"], shlex.split(match["options"])) for match in found]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_commands(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for launch, method, options in commands(path):
        if "--config_file" in launch:
            assert (ROOT / launch[launch.index("--config_file") + 1]).is_file()
        args = align.parse(method, options)  # pyright: ignore[reportArgumentType]
        if "--model_name_or_path" in options:
            assert args.model.model_name_or_path == options[options.index("--model_name_or_path") + 1]


def test_the_readmes_options_are_those_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two commands for a model of one's own settle every option alike."""
    monkeypatch.chdir(ROOT)
    parsed = [align.parse("sft", options) for _, _, options in commands("README.md")]
    of_file, of_line = [plan for plan in parsed if plan.model.model_name_or_path == "google/gemma-2-2b"]
    assert of_file.to_json() == of_line.to_json()


def evaluations(document: str) -> list[tuple[str, list[str]]]:
    found = [match for line in lines(document) if (match := EVALUATE.match(line))]
    return [(match["name"], shlex.split(match["options"])) for match in found]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_evaluations(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, options in evaluations(path):
        if name == "attack":
            assert parse_attack(options, "sails attack").method == options[0]
        elif name == "compare":
            args, _, studies = read_plans(CommandLine.read(options), None)
            names = list(names_of(studies, Results(tmp_path)))
            assert all(fnmatch.filter(names, name) for name in args.cell or ())
        else:
            CommandLine.read(options).parse(CLASSES[name])


@pytest.mark.parametrize("path", DOCUMENTS)
def test_files_exist(path: str) -> None:
    """Scripts, and configurations and templates of the repository."""
    for line in lines(path):
        for word in shlex.split(line):
            if re.match(r"(recipes|eval|benchmarks|accelerate_configs|docs)/.*\.(py|yaml|jinja|slurm)\b", word):
                assert (ROOT / word.partition("@")[0]).is_file(), line


def test_commands_are_found() -> None:
    found = {path: commands(path) for path in DOCUMENTS}
    assert found["README.md"]
    assert any(launch for path in found for launch, _, _ in found[path])
    assert {name for path in DOCUMENTS for name, _ in evaluations(path)} == {*CLASSES, "attack", "compare"}
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


def test_blocks_are_read(tmp_path: Path) -> None:
    """Continued lines, comments, output, what is needed; and a line that is no command is found."""
    document = tmp_path / "document.md"
    document.write_text(
        "Text:\n\n    sails discover \\\n        --top_k 8    # some\n    make demo\n\n    error: of a command\n\n"
        "    # needs: GPU, network\n    sails train sft\n\n```bash\nhf download a\n\nsails eval safety\n```\n\n"
        "    $ sails judge-check\n    right 64%\n\n```yaml\nsails: 1\n```\n\n    sails merge RUN\n    what it prints\n"
    )
    *found, last = blocks(str(document))
    assert [(block.needs, block.commands) for block in found] == [
        (None, ["sails discover --top_k 8", "make demo"]),
        (None, []),
        ("GPU, network", ["sails train sft"]),
        (None, ["hf download a", "sails eval safety"]),
        (None, ["sails judge-check"]),
        (None, []),
    ]
    with pytest.raises(ValueError, match="what it prints"):
        assert last.commands
