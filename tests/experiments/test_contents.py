"""Cells and steps are known by the content of what their options name: a file replaced at its path is another one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_comparison import write_comparison
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.evaluation.attacks.options import GcgOptions, TransferArguments, WrapperArguments
from sails_align.evaluation.options import ComparedArguments, TrackerArguments
from sails_align.experiments.commands import OPTIONS
from sails_align.experiments.contents import NAMES_FILES, contents_hash
from sails_align.experiments.plan import Cell, Protocol, Run, Tampering
from sails_align.experiments.reproduction.plan import Reproduction
from sails_align.experiments.results import read_plan
from sails_align.experiments.studies import read_plans
from sails_align.testbed.build import ASSETS
from sails_align.training.options import own_options

NO_FILES = set(
    """
    api_key_env apply_chat_template backend bad_responses base_url batch_size category_column
    chosen_column contrast device dtype good_labels guard_family guard_tokens helpful_chosen_column
    helpful_dataset_config helpful_dataset_split helpful_label_column helpful_prompt_column init initial_suffix judge
    judge_api_key_env
    judge_backend judge_base_url kind label_column layer_map loss on_bad_rows part preset prompt_column prompt_tokens
    derta_refusal rejected_column revision sae_ids sae_placement sae_release score split steer subspace_mode
    redundancy_form sspu_vector gate_prefix
    system_instruction system_prompt target wrappers frozen_units trained_units output_dir given refusal_tokens clade
    sift_modules sift_entries report_to
    """.split()  # noqa: SIM905
)
"""Our options with texts that are never names of files (or, `output_dir`, not of files that are read)."""


def test_each_option_with_a_text_is_known_to_name_files_or_not() -> None:
    classes = {*(of for classes in OPTIONS.values() for of in classes), *own_options("sft"), *own_options("dpo")}
    classes |= {ComparedArguments, TrackerArguments, GcgOptions, TransferArguments, WrapperArguments}
    texts = {option.name for of in classes for option in fields(of) if "str" in str(option.type)}
    unknown = [name for name in texts if bool(NAMES_FILES.search(name)) == (name in NO_FILES)]
    assert not unknown, "say of each new option whether its value can be a file or a folder"
    assert texts >= NO_FILES
    of_libraries = {option.name for of in (SFTConfig, DPOConfig, ModelConfig, ScriptArguments) for option in fields(of)}
    named = {"model_name_or_path", "dataset_name", "chat_template_path", "deepspeed", "fsdp_config"}
    assert named <= {name for name in of_libraries if NAMES_FILES.search(name)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A comparison whose model, SAEs, prompts and template are files of its own."""
    write_comparison(tmp_path)
    for name in ("model", "saes"):
        shutil.copytree(ASSETS / name, tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How?", "kind": "harmful"}\n')
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "launch.yaml").write_text("num_processes: 2\n")
    recipe = yaml.safe_load((tmp_path / "sails.yaml").read_text())
    recipe |= {"model_name_or_path": str(tmp_path / "model"), "sae_path": str(tmp_path / "saes")}
    (tmp_path / "sails.yaml").write_text(yaml.safe_dump(recipe))
    values = yaml.safe_load((tmp_path / "compare.yaml").read_text())
    values["launch"] = ["--config_file", str(tmp_path / "launch.yaml")]
    values["evaluate"]["test"]["safety"] |= {"prompts": [str(tmp_path / "prompts.jsonl")], "judge": "rules"}
    values["runs"]["base"] = {
        "model": str(tmp_path / "model"),
        "options": {"chat_template_path": str(tmp_path / "t.jinja")},
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return tmp_path


def cells(folder: Path) -> list[Cell]:
    """The two of the test part: base, and SAILS."""
    return (
        read_plans(CommandLine.read(["--config", str(folder / "compare.yaml")]), None)[2][0].plans[0][1].test_cells({})
    )


def records(folder: Path) -> dict[str, Any]:
    plan = read_plans(CommandLine.read(["--config", str(folder / "compare.yaml")]), None)[2][0].plans[0][1]
    assert plan.protocol is not None
    steps = Reproduction(plan.runs, plan.protocol, folder / "out", 0).jobs()
    return {step.name: step.record for step in steps}


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": ("model/model.safetensors", lambda path: path.write_bytes(path.read_bytes() + b" ")),
    "tokenizer": ("model/tokenizer_config.json", lambda path: path.write_text(path.read_text() + "\n")),
    "SAE": ("saes/layer_1/cfg.json", lambda path: path.write_text(path.read_text() + "\n")),
    "data": ("safety.jsonl", lambda path: path.write_text(path.read_text().replace("a", "e", 1))),
    "recipe": ("sails.yaml", lambda path: path.write_text(path.read_text() + "lora_dropout: 0.1\n")),
    "launch": ("launch.yaml", lambda path: path.write_text("num_processes: 4\n")),
    "prompts": ("prompts.jsonl", lambda path: path.write_text('{"prompt": "Who?", "kind": "harmful"}\n')),
    "template": ("t.jinja", lambda path: path.write_text("{{ messages[-1].content }}")),
}
OF_BASE_ALONE, OF_TRAINING_ALONE = {"template"}, {"SAE", "data", "recipe"}
NOT_TRAINED_AGAIN = {"prompts", "template"}


@pytest.mark.parametrize("what", CHANGES)
def test_a_file_replaced_at_its_path_makes_other_cells(folder: Path, what: str) -> None:
    (base, sails), steps = cells(folder), records(folder)
    assert [cell.key for cell in cells(folder)] == [base.key, sails.key]
    assert records(folder) == steps
    name, change = CHANGES[what]
    assert (folder / name).is_file()
    change(folder / name)
    others = cells(folder)
    assert (others[0].key == base.key) == (what in OF_TRAINING_ALONE)
    assert (others[1].key == sails.key) == (what in OF_BASE_ALONE)
    assert (others[1].training_key == sails.training_key) == (what in NOT_TRAINED_AGAIN)
    changed = {step for step, record in records(folder).items() if record != steps[step]}
    assert ("train/sft-sails" in changed) == (what not in NOT_TRAINED_AGAIN | {"launch"})
    assert ("evaluate/base/safety" in changed) == (what in {"weights", "tokenizer", "prompts", "template"})


def test_what_a_step_makes_is_not_what_decides_it(folder: Path) -> None:
    before = records(folder)
    (folder / "out" / "sft-sails").mkdir(parents=True)
    (folder / "out" / "sft-sails" / "config.json").write_text("{}")
    assert records(folder) == before


def test_a_world_replaced_in_its_folder_makes_other_cells(tmp_path: Path) -> None:
    shutil.copytree(ASSETS, tmp_path / "world", ignore=shutil.ignore_patterns("*.safetensors"))

    def keys() -> set[str]:
        line = CommandLine.read(["--world", str(tmp_path / "world"), "--worlds", str(tmp_path / "world") + "/"])
        return {
            cell.key for study in read_plans(line, None)[2] for _, plan in study.plans for cell in plan.test_cells({})
        }

    before = keys()
    assert keys() == before
    world = json.loads((tmp_path / "world" / "world.json").read_text())
    (tmp_path / "world" / "world.json").write_text(json.dumps({**world, "seed": 5}))
    assert not keys() & before


def test_an_adapter_is_known_with_its_base(tmp_path: Path) -> None:
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    )
    words = ["--model", str(tmp_path / "adapter")]
    before = contents_hash(words)
    (tmp_path / "adapter" / "log.txt").write_text("of no matter")
    assert contents_hash(words) == before
    (tmp_path / "base" / "config.json").write_text('{"vocab_size": 7}')
    assert contents_hash(words) != before


def test_words_that_are_no_files_have_no_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()  # a folder that a split's name is not
    words = ["--split", "train", "--prompts", "xstest", "--base_url", "http://x/v1", "--system_prompt", "x/" * 3000]
    assert contents_hash(words) == ""
    with pytest.raises(InputError, match=r"cannot read /proc/self/mem: Input/output error"):
        contents_hash(["--prompts", "harmbench=/proc/self/mem"])


def test_files_named_in_a_file_of_options_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    rows, config = tmp_path / "rows.jsonl", tmp_path / "sft.yaml"
    rows.write_text("{}\n")
    config.write_text(f"dataset_name: {rows}\n")
    before = contents_hash(["--config", "~/sft.yaml"])
    rows.write_text("{} \n")
    assert contents_hash(["--config", "~/sft.yaml"]) != before
    config.write_text("- dataset_name\n")  # which the command that reads it refuses
    assert contents_hash(["--config", "~/sft.yaml"])


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    argv = ["--study", "main", "ablations", "methods", "tampering", "--examples", "8", "--worlds", "testbed:1"]
    studies = read_plans(CommandLine.read(argv), None)[2]
    write_json(tmp_path / "plan.json", {"studies": [asdict(study) for study in studies], "command": "sails compare"})
    assert read_plan(tmp_path / "plan.json") == (studies, "sails compare")


def test_every_field_of_a_cell_but_its_labels_is_in_its_key(folder: Path) -> None:
    cell = cells(folder)[1]
    assert cell.protocol is not None
    changes: dict[str, Any] = {
        **{"learning_rate": 0.5, "seed": 9, "part": "validation", "world": "other", "world_sha256": "0"},
        **{"measures": replace(cell.measures, n_examples=3), "protocol": replace(cell.protocol, model="other")},
        "run": replace(cell.run, options=("--x", "y")),
    }
    assert changes.keys() == {field.name for field in fields(Cell)}
    assert len({cell.key, *(replace(cell, **{name: value}).key for name, value in changes.items())}) == 1 + len(changes)
    of_run = {"name": "x", "trainer": "dpo", "options": (), "files_sha256": "0", "grid": (0.5,)}
    of_run |= {"tampering": Tampering("task", "none"), "method": "sift"}
    harmless = {"label": "x", "is_tuned": False, "is_reference": True}
    assert of_run.keys() | harmless.keys() == {field.name for field in fields(Run)}
    for name, value in (of_run | harmless).items():
        other = replace(cell, run=replace(cell.run, **{name: value}))
        assert (other.key == cell.key) == (name in harmless), name
    of_protocol = {field.name: "0" for field in fields(Protocol)} | {"evaluate": (), "launch": ("--x",)}
    for name, value in of_protocol.items():
        assert replace(cell, protocol=replace(cell.protocol, **{name: value})).key != cell.key, name
