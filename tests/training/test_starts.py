"""What training cannot start from: adapters, references and data that do not suit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import edit_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import Project, build
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import deepspeed

from sails_align.core.errors import InputError
from sails_align.edits.weights import open_aligned
from sails_align.subspace.options import Method
from sails_align.training import run as align


@pytest.fixture(scope="module")
def trained(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory; do not change it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    align.main("sft", project.argv(folder, "--init", "default"))
    return folder


def refused(project: Project, tmp_path: Path, *options: str, method: Method = "dpo") -> str:
    with pytest.raises(InputError) as error:
        build(project.dpo_argv(tmp_path / "run", "--init", "default", *options), method=method)
    message = str(error.value)
    assert 1 <= len(message.splitlines()) <= 3
    return message


def from_adapter(project: Project, tmp_path: Path, *options: str) -> str:
    with pytest.raises(InputError) as error:
        build(project.dpo_argv(tmp_path / "run", *options), method="dpo")
    return str(error.value)


def test_an_adapter_that_is_none(project: Project, tmp_path: Path) -> None:
    assert "holds no adapter (no adapter_config.json)" in from_adapter(
        project, tmp_path, "--adapter_path", str(tmp_path)
    )
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json is damaged" in from_adapter(project, tmp_path, "--adapter_path", str(tmp_path))


def test_an_adapter_of_another_base(project: Project, trained: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(project.folder / "tiny", tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    options = ["--adapter_path", str(trained), "--model_name_or_path", str(other), "--sae_allow_mismatch", "true"]
    assert "was trained on another model (tiny)" in from_adapter(project, tmp_path, *options)
    plain = tmp_path / "plain"  # without a record of ours: known by name
    shutil.copytree(trained, plain, ignore=shutil.ignore_patterns("run.json", "checkpoint-*"))
    options[1] = str(plain)
    assert "was trained on another model" in from_adapter(project, tmp_path, *options)
    build(project.dpo_argv(tmp_path / "run", "--adapter_path", str(plain)), method="dpo")


def test_an_adapter_whose_base_has_other_names(
    project: Project, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to the base is the base; a relative name of it begins in a folder above the adapter."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "link").symlink_to(project.folder / "tiny")
    plain = tmp_path / "runs" / "plain"
    shutil.copytree(trained, plain, ignore=shutil.ignore_patterns("run.json", "checkpoint-*"))
    linked = ["--model_name_or_path", str(tmp_path / "models" / "link")]
    for adapter, name, more in ((trained, None, linked), (plain, None, linked), (plain, "models/link", [])):
        if name is not None:
            edit_config(adapter, base_model_name_or_path=name)
        monkeypatch.chdir(tmp_path / "models")
        build(project.dpo_argv(tmp_path / "run", "--adapter_path", str(adapter), *more), method="dpo")


def test_an_adapter_that_is_damaged(project: Project, trained: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(trained, tmp_path / "copied"))
    options = ["--adapter_path", str(copied)]
    weights = load_file(copied / "adapter_model.safetensors")
    del weights[min(weights)]
    save_file(weights, copied / "adapter_model.safetensors")
    assert "is not whole" in from_adapter(project, tmp_path, *options)
    (copied / "run.json").write_text("[]")
    shutil.copy(trained / "adapter_model.safetensors", copied)
    assert "run.json is damaged" in from_adapter(project, tmp_path, *options)
    message = from_adapter(project, tmp_path, "--adapter_path", str(trained), "--output_dir", str(trained))
    assert "where the new adapter would go" in message


def test_one_module_and_all_of_them(project: Project, tmp_path: Path) -> None:
    for modules, n_expected in {"q_proj": 1, "all-linear": 7}.items():
        options = ["--init", "default", "--lora_target_modules", modules]
        model = build(project.argv(tmp_path / modules, *options)).trainer.model
        found = {
            name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name
        }
        assert len(found) == n_expected
    with pytest.raises(InputError, match=r"Target modules .*not found"):
        build(project.argv(tmp_path / "x", "--init", "default", "--lora_target_modules", "nothing"))


def test_a_subspace_of_another_method(project: Project, tmp_path: Path) -> None:
    align.main("sft", project.argv(tmp_path / "run", "--max_steps", "1"))
    given = ["--subspace_path", str(tmp_path / "run" / "subspace"), "--init", "mean_diff"]
    with pytest.raises(InputError, match="was made by sails, but init is mean_diff"):
        build(project.argv(tmp_path / "other", *given))


def test_an_adapter_that_is_not_plain_lora(project: Project, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(project.folder / "tiny")
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    get_peft_model(base, config).save_pretrained(tmp_path / "dora")
    assert "is not a plain LoRA adapter" in from_adapter(project, tmp_path, "--adapter_path", str(tmp_path / "dora"))


def test_sft_goes_on_from_an_adapter(project: Project, trained: Path, tmp_path: Path) -> None:
    metrics = align.main("sft", project.argv(tmp_path / "run", "--adapter_path", str(trained)))
    first = json.loads((trained / "metrics.json").read_text())["trained"]["held_out_loss"]
    assert metrics["base"]["held_out_loss"] == pytest.approx(first, abs=1e-6)
    assert metrics["trained"]["held_out_loss"] < first
    assert metrics["provenance"]["identity"]["init"] == "adapter"
    aligned = open_aligned(tmp_path / "run", None, None)[1]  # edits know the model before by the run's record
    assert aligned is not None
    assert aligned.spec.adapter == str(trained)


def test_a_reference_of_another_vocabulary(project: Project, tmp_path: Path) -> None:
    other = Path(shutil.copytree(project.folder / "tiny", tmp_path / "other"))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    message = refused(project, tmp_path, "--ref_model_name_or_path", str(other))
    assert "has another vocabulary" in message
    assert "cannot load the model" in refused(project, tmp_path, "--ref_model_name_or_path", str(tmp_path / "none"))


def test_another_reference_is_the_one_that_is_used(project: Project, tmp_path: Path) -> None:
    other = Path(shutil.copytree(project.folder / "tiny", tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    torch.manual_seed(0)
    changed = {name: value + 0.05 * torch.randn_like(value) for name, value in weights.items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    rewards = {}
    for name, reference in {"same": project.folder / "tiny", "other": other}.items():
        options = ["--init", "default", "--ref_model_name_or_path", str(reference), "--logging_steps", "1"]
        built = build(project.dpo_argv(tmp_path / name, *options, "--max_steps", "1"), method="dpo")
        built.trainer.train()
        rewards[name] = abs(built.trainer.state.log_history[0]["rewards/chosen"])
    assert rewards["same"] == 0
    assert rewards["other"] > 1e-3


def test_dpo_needs_pairs(project: Project, tmp_path: Path) -> None:
    helpful = str(project.folder / "helpful.jsonl")
    message = refused(project, tmp_path, "--helpful_dataset_name", helpful)
    assert "helpful.jsonl has no rejected ones" in message
    assert "--helpful_ratio 0" in message
    options = ["--init", "default", "--helpful_dataset_name", helpful, "--helpful_ratio", "0"]
    built = build(project.dpo_argv(tmp_path / "run", *options), method="dpo")
    assert len(built.source.train) == len(built.source.safety)


def test_an_odd_rank(project: Project, tmp_path: Path) -> None:
    message = refused(project, tmp_path, "--init", "orthogonal", "--lora_r", "3")
    assert "lora_r is 3, but --init orthogonal needs an even one" in message


def test_packages_that_are_not_installed(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused(project, tmp_path, "--report_to", "no_such_service")
    assert "report_to is no_such_service, which is unknown or not installed" in message
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')

    def missing(name: str) -> None:
        raise ImportError(f"{name} is not installed")

    monkeypatch.setattr("transformers.integrations.deepspeed.dep_version_check", missing)
    message = refused(project, tmp_path, "--deepspeed", str(tmp_path / "zero.json"))
    deepspeed.unset_hf_deepspeed_config()  # which is left half made
    assert "needs a package that is not installed" in message
    assert "sails-align[deepspeed]" in message
