"""What SECURITY.md says of untrusted files: no pickle is opened, no code that comes with a file is run."""

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from paths import ROOT
from safetensors.torch import load_file

from sails_align.cli import check_adapter, edit
from sails_align.cli import train_sae as sae_training
from sails_align.cli.evaluate import attack, harness, safety
from sails_align.core.errors import InputError
from sails_align.data.loading import load_rows
from sails_align.models.load import load_truncated
from sails_align.reporting.page import Grid, Page, Section, entries, write_page
from sails_align.saes.explain import Context, Meaning
from sails_align.testbed.build import ASSETS
from sails_align.training import run as align

SOURCES = [path for folder in ("sails_align", "recipes", "eval") for path in sorted((ROOT / folder).rglob("*.py"))]
DANGEROUS = (
    r"\btorch\.load\(",
    r"\bimport (?:pickle|dill|joblib|marshal|shelve)\b|\bfrom (?:pickle|dill|joblib|marshal|shelve)\b",
    r"(?<![\w.])(?:eval|exec)\(",
    r"shell=True|os\.system|os\.popen",
    r"trust_remote_code\s*[:=]\s*(?:bool\s*=\s*)?True|\"trust_remote_code\":\s*True",
    r"allow_pickle=True|weights_only=False",
    r"yaml\.(?:load|full_load|unsafe_load)\(",
)
TRAIN = ["--max_steps", "1", "--max_train_examples", "16", "--eval_examples", "4", "--save_strategy", "no"]


def code_of(path: Path) -> str:
    """A file without its comments."""
    return re.sub(r"#.*", "", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("pattern", DANGEROUS)
def test_nothing_dangerous_is_called(pattern: str) -> None:
    assert len(SOURCES) > 100
    assert [path.name for path in SOURCES if re.search(pattern, code_of(path))] == []


@pytest.mark.parametrize(
    "line",
    [
        "x = torch.load(path)",
        "import pickle",
        "from joblib import load",
        "return eval(text)",
        "subprocess.run(line, shell=True)",
        "trust_remote_code: bool = True",
        "f(trust_remote_code=True)",
        '{"trust_remote_code": True}',
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
    ],
)
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in DANGEROUS)


def test_its_own_methods_are_no_finds() -> None:
    assert not any(re.search(pattern, "model.eval(); yaml.safe_load(text)") for pattern in DANGEROUS)


class Trap:
    """Pickled, it makes a file when it is opened carelessly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def pickled(folder: Path, name: str, weights: str, mark: Path) -> Path:
    """The folder with its safetensors replaced by a pickle with a trap."""
    tensors = load_file(folder / weights)
    (folder / weights).unlink()
    torch.save({**tensors, "trap": Trap(mark)}, folder / name)
    return folder


def some_rows(folder: Path) -> Path:
    rows = [{"prompt": f"how do i split lamp {n}?", "chosen": "no", "rejected": "with a saw"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def test_the_trap_works(tmp_path: Path) -> None:
    torch.save(Trap(tmp_path / "mark"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "mark").is_dir()


def test_pickled_models_are_not_opened(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    model = Path(shutil.copytree(ASSETS / "model", tmp_path / "model"))
    pickled(model, "pytorch_model.bin", "model.safetensors", mark)
    name, saes = ["--model_name_or_path", str(model)], ["--sae_path", str(ASSETS / "saes")]
    rows = some_rows(tmp_path)
    data = ["--dataset_name", str(rows), "--sae_allow_mismatch", "true"]
    ways = {
        "discovery": lambda: load_truncated(model, 1),
        "train": lambda: align.main("sft", [*name, *saes, *data, *TRAIN, "--output_dir", str(tmp_path / "a")]),
        "all weights": lambda: align.main(
            "sft", [*name, *data, *TRAIN, "--use_peft", "false", "--output_dir", str(tmp_path / "b")]
        ),
        "eval": lambda: safety(["--model", str(model), "--prompts", "testbed", "--output_dir", str(tmp_path / "c")]),
        "harness": lambda: harness(["--model", str(model), "--tasks", "testbed", "--output_dir", str(tmp_path / "d")]),
        "attack": lambda: attack(["gcg", "--model", str(model), "--output_dir", str(tmp_path / "e")]),
        "train-sae": lambda: sae_training.main(
            [*name, "--layers", "1", "--dataset_name", str(rows), "--output_dir", str(tmp_path / "f")]
        ),
    }
    for way, use in ways.items():
        with pytest.raises(InputError, match=r"cannot load the model .*model\.safetensors"):
            use()
        assert not mark.exists(), way


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    align.main("sft", [*TRAIN, "--disable_tqdm", "true", "--output_dir", str(folder)])
    return folder


def test_pickled_adapters_are_not_opened(run: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    adapter = Path(shutil.copytree(run, tmp_path / "adapter"))
    pickled(adapter, "adapter_model.bin", "adapter_model.safetensors", mark)
    ways = (
        lambda: safety(["--model", str(adapter), "--output_dir", str(tmp_path / "a")]),
        lambda: align.main("dpo", [*TRAIN, "--adapter_path", str(adapter), "--output_dir", str(tmp_path / "b")]),
        lambda: edit.main(["merge", str(adapter), "--output", str(tmp_path / "c")]),
        lambda: check_adapter.main([str(adapter)]),
    )
    for use in ways:
        with pytest.raises(InputError, match="is a pickle, which is not read"):
            use()
    assert not mark.exists()


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    model = Path(shutil.copytree(ASSETS / "model", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"import os; os.mkdir({str(mark)!r})\nclass Config: pass\nclass Model: pass\n")
    rows = some_rows(tmp_path)
    data = ["--dataset_name", str(rows), "--init", "default"]
    ways = (
        lambda: load_truncated(model, 1),
        lambda: safety(["--model", str(model), "--prompts", "testbed", "--output_dir", str(tmp_path / "a")]),
        lambda: align.main(
            "sft", ["--model_name_or_path", str(model), *data, *TRAIN, "--output_dir", str(tmp_path / "b")]
        ),
    )
    for use in ways:
        with pytest.raises(InputError, match=r"code of its own, which is not run;\nread that code.*trust_remote_code"):
            use()
    assert not mark.exists()


def test_a_chat_template_cannot_reach_out(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}{{ cycler.__init__.__globals__.os.mkdir('" + str(mark) + "') }}")
    with pytest.raises(InputError, match="unsafe"):
        safety(["--n_prompts", "1", "--chat_template_path", str(template), "--output_dir", str(tmp_path / "a")])
    assert not mark.exists()


def test_a_data_set_with_a_script_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"import os; os.mkdir({str(mark)!r})\n")
    with pytest.raises(InputError):
        load_rows(str(folder))
    assert not mark.exists()


def test_a_configuration_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path / 'mark'}']\n")
    with pytest.raises(InputError, match="is not YAML"):
        align.main("sft", ["--config", str(path)])
    assert not (tmp_path / "mark").exists()


def test_a_page_holds_no_markup_of_others(tmp_path: Path) -> None:
    markup = "<script>alert(1)</script>\"'><img src=x onerror=y>"
    context = {"tokens": [markup], "activations": [1.0]}
    meaning = asdict(Meaning(1, 2, [Context(**context)], [markup], [markup], [(3, 0.5)], None, markup))
    grid = Grid([markup], [entries(markup)])
    section = Section(markup, [markup], [grid], meanings=[meaning], findings=[markup])
    report = Page(markup, [markup], [section], markup, {markup: markup})
    html, _ = write_page(report, tmp_path)
    text = html.read_text()
    assert "alert(1)" in text
    assert "<script" not in text
    assert "<img src=x" not in text


def test_what_the_security_policy_names_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`((?:tests|sails_align)/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 15
    for path, name in named:
        assert (ROOT / path).is_file(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


def test_the_citation() -> None:
    """Keys that the format (CFF 1.2) requires, and the version of the package."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type", "license"} <= citation.keys()
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## [{citation['version']}] - {citation['date-released']}" in (ROOT / "CHANGELOG.md").read_text()
    (paper,) = citation["references"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2512.23260", "description": "arXiv preprint"}]
    assert [person["family-names"] for person in paper["authors"]][:2] == ["Wang", "Ma"]
    assert len(paper["authors"]) == 8
