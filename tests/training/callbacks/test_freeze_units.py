"""Frozen units keep their values bit for bit, in trainings with all weights and with adapters."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import Project, build, distance
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from sails_align.cli import main as sails
from sails_align.cli import units as command
from sails_align.core.errors import InputError
from sails_align.models.hooks import decoder_layers
from sails_align.training import run as align
from sails_align.training.callbacks.freeze_units import freeze_units
from sails_align.training.callbacks.frozen import Frozen
from sails_align.units.layout import MODULES, columns_and_rows
from sails_align.units.options import SETS
from sails_align.units.sets import Units

FULL = ["--use_peft", "false", "--learning_rate", "0.001"]
DECAY = ["--weight_decay", "0.5"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARES = ["--scu_share", "0.1", "--ucu_share", "0.2", "--ru_share", "0.2"]


@pytest.fixture(scope="module")
def units(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("found")
    command.main([*project.argv(folder), *SHARES])
    return folder / "units"


def entries(model: Any, folder: Path, wanted: list[str]) -> dict[str, Tensor]:
    """Which entries of each linear module's weight are frozen, computed from the sets alone."""
    chosen, found = Units.load(folder).chosen(wanted), {}
    for index, block in enumerate(decoder_layers(model)):
        own = {key.partition(".")[2]: of for key, of in chosen.items() if key.startswith(f"{index}.")}
        for path in MODULES:
            columns_I, rows_O = columns_and_rows(block, path, own)
            rows_O = torch.zeros(block.get_submodule(path).out_features, dtype=torch.bool) if rows_O is None else rows_O
            found[f"model.layers.{index}.{path}.weight"] = columns_I[None, :] | rows_O[:, None]
    return found


def base_of(project: Project) -> Any:
    return AutoModelForCausalLM.from_pretrained(project.folder / "tiny")


# All weights


@pytest.mark.parametrize(("method", "argv"), [("sft", "argv"), ("dpo", "dpo_argv")])
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_frozen_entries_keep_their_bits_and_others_do_not(
    project: Project, units: Path, tmp_path: Path, method: Any, argv: str, optim: str
) -> None:
    options = [*FULL, *DECAY, "--optim", optim, "--freeze_units", str(units), "--frozen_units", "scu", "cu:0.06"]
    metrics = align.main(method, getattr(project, argv)(tmp_path, *options))
    trained, base = load_file(tmp_path / "model.safetensors"), base_of(project)
    before, frozen = base.state_dict(), entries(base, units, ["scu", "cu:0.06"])
    for name, frozen_OI in frozen.items():
        assert torch.equal(trained[name][frozen_OI], before[name][frozen_OI])
        assert (trained[name][~frozen_OI] != before[name][~frozen_OI]).float().mean() > 0.9
    n_frozen = sum(int(of.sum()) for of in frozen.values())
    assert metrics["cost"]["trainable_parameters"] == base.num_parameters() - n_frozen
    assert 0.15 < n_frozen / sum(of.numel() for of in frozen.values()) < 0.5
    assert (trained["model.embed_tokens.weight"] != before["model.embed_tokens.weight"]).any()
    assert "| frozen units | `cu:0.06, scu` |" in (tmp_path / "README.md").read_text()


def test_a_mask_of_gradients_alone_would_lose_them_to_weight_decay(
    project: Project, units: Path, tmp_path: Path
) -> None:
    """The control: the same training in which nothing is written back."""
    trainer = build([*project.argv(tmp_path, *FULL, *DECAY), "--freeze_units", str(units)]).trainer
    (callback,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, Frozen)]
    callback.on_optimizer_step = lambda *args, **kwargs: None  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()
    after, base = trainer.model.state_dict(), base_of(project)
    for name, frozen_OI in entries(base, units, ["scu"]).items():
        assert not frozen_OI.any() or not torch.equal(after[name][frozen_OI], base.state_dict()[name][frozen_OI])


def test_all_sets_are_the_start_and_none_is_plain_training(project: Project, units: Path, tmp_path: Path) -> None:
    states = {}
    for name, more in (
        ("plain", []),
        ("none", ["--freeze_units", str(units), "--frozen_units", "cu:1e-9"]),
        ("all", ["--freeze_units", str(units), "--frozen_units", *SETS]),
    ):
        trainer = build(project.argv(tmp_path / name, *FULL, *DECAY, "--save_strategy", "no", *more)).trainer
        trainer.train()
        states[name] = trainer.model.state_dict()
    assert distance(states["none"], states["plain"]) == 0
    before = base_of(project).state_dict()
    inside = [name for name in before if ".layers." in name and "_proj" in name]
    assert all(torch.equal(states["all"][name], before[name]) for name in inside)
    assert distance(states["all"], states["plain"]) > 1e-3


def test_only_some_units_train(project: Project, units: Path, tmp_path: Path) -> None:
    more = ["--freeze_units", str(units), "--trained_units", "ru", "--gradient_checkpointing", "true"]
    align.main("sft", project.argv(tmp_path, *FULL, *DECAY, *more))
    trained, base = load_file(tmp_path / "model.safetensors"), base_of(project)
    before, frozen = base.state_dict(), entries(base, units, ["scu", "ucu", "cu"])
    moved = 0
    for name, value in before.items():
        changed = trained[name] != value if name in trained else torch.zeros(1, dtype=torch.bool)
        moved += changed.sum().item()
        assert not (changed & frozen[name] if name in frozen else changed).any(), name
    free = sum((~of).sum().item() for of in frozen.values())
    assert 0.9 * free < moved <= free
    assert "| trained units | `ru` |" in (tmp_path / "README.md").read_text()


def test_frozen_gradients_do_not_count_in_the_norm(project: Project, units: Path, tmp_path: Path) -> None:
    """Clipping and the optimizer's moments are those of the entries that train."""
    trainer = build([*project.argv(tmp_path, *FULL, "--max_steps", "1"), "--freeze_units", str(units)]).trainer
    trainer.train()
    frozen = entries(base_of(project), units, ["scu"])
    moments = trainer.optimizer.state
    for name, parameter in trainer.model.named_parameters():
        if name in frozen:
            assert not moments[parameter]["exp_avg_sq"][frozen[name]].any()


# Adapters


@pytest.mark.parametrize(
    "options",
    [["--init", "default"], ["--subspace_mode", "freeze"], ["--subspace_mode", "decay"], ["--init", "orthogonal"]],
    ids=["lora", "sails frozen", "sails decay", "orthogonal"],
)
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_update_of_an_adapter_is_zero_on_frozen_entries(
    project: Project, units: Path, tmp_path: Path, options: list[str], method: Any
) -> None:
    argv = (project.argv if method == "sft" else project.dpo_argv)(tmp_path, *options, *DECAY)
    argv += ["--lora_target_modules", *ALL, "--freeze_units", str(units), "--frozen_units", "scu", "ucu:0.1"]
    argv += ["--save_strategy", "no"]
    trainer = build(argv, method=method).trainer
    trainer.train()
    weights = {name: p.detach() for name, p in trainer.model.named_parameters() if ".default." in name}
    sums = torch.zeros(2)
    for name, frozen_OI in entries(base_of(project), units, ["scu", "ucu:0.1"]).items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        update_OI = weights[f"{stem}.lora_B.default.weight"] @ weights[f"{stem}.lora_A.default.weight"]
        assert not update_OI[frozen_OI].any()
        assert not weights[f"{stem}.lora_A.default.weight"][:, frozen_OI.all(0)].any()
        sums += torch.tensor([update_OI[~frozen_OI].abs().sum(), frozen_OI.sum()])
    assert sums.min() > 0.1


def test_an_adapter_on_some_modules(project: Project, units: Path, tmp_path: Path) -> None:
    more = ["--init", "default", "--lora_target_modules", "v_proj", "down_proj", "--freeze_units", str(units)]
    align.main("sft", project.argv(tmp_path, *more, "--frozen_units", *SETS))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 12
    assert not any(value.any() for value in saved.values())


@pytest.mark.parametrize("config_class", [LlamaConfig, Gemma2Config])
def test_parts_of_both_architectures(config_class: Any) -> None:
    """With biases, too: one belongs to its row."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 6}
    config = config_class(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    model = AutoModelForCausalLM.from_config(config)
    sizes = {"attention_input": 16, "heads": 24, "mlp_input": 16, "mlp_hidden": 24}
    frozen = {f"0.{name}": torch.arange(n) == 2 for name, n in sizes.items()}
    parts = freeze_units(model, frozen)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(part.parameter)].partition("layers.0.")[2]: sorted(part.places) for part in parts}
    both = {f"{path}.weight": [0, 1] for path in ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")}
    columns = {f"{path}.weight": [1] for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj")}
    assert found == {**both, **columns, "mlp.down_proj.weight": [1], "self_attn.v_proj.bias": [0]}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"]))
    freeze_units(adapted, frozen)
    assert not adapted.get_parameter("base_model.model.model.layers.0.self_attn.v_proj.lora_A.default.weight")[
        :, 2
    ].any()


# Runs


def test_a_resumed_run_is_the_same(project: Project, units: Path, tmp_path: Path) -> None:
    options = [*FULL, *DECAY, "--freeze_units", str(units), "--ema_half_life", "2"]
    align.main("sft", project.argv(tmp_path / "whole", *options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    align.main("sft", project.argv(tmp_path / "broken", *options, "--resume_from_checkpoint", "true"))
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert distance(whole, broken) == 0
    before = base_of(project).state_dict()
    for name, frozen_OI in entries(base_of(project), units, ["scu"]).items():
        assert torch.equal(whole[name][frozen_OI], before[name][frozen_OI])


def test_other_units_are_another_run(project: Project, units: Path, tmp_path: Path) -> None:
    found = Units.load(units)
    Units(found.utility, found.safety, found.sets, found.provenance).save(tmp_path / "others")
    shutil.copytree(units, tmp_path / "copy")
    identities = [
        build(project.argv(tmp_path / "run", *FULL, "--freeze_units", str(folder))).identity()
        for folder in (units, tmp_path / "copy", tmp_path / "others")
    ]
    assert identities[0] == identities[1]
    assert [name for name, value in identities[0].items() if value != identities[2][name]] == ["units"]


def test_units_of_another_model(
    project: Project, units: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = Units.load(units)
    identity = {**found.provenance["identity"], "model": {"name": "elsewhere", "files": {"config.json": "0"}}}
    Units(found.safety, found.utility, found.sets, {"identity": identity}).save(tmp_path / "others")
    run = project.argv(tmp_path / "run", *FULL, "--max_steps", "1", "--freeze_units", str(tmp_path / "others"))
    with caplog.at_level(logging.WARNING):
        align.main("sft", run)
    assert "were found in another model (elsewhere) than" in caplog.text
    fewer = {
        key: {k: v for k, v in of.items() if k != "2.heads"} for key, of in vars(found).items() if key != "provenance"
    }
    Units(**fewer).save(tmp_path / "fewer")
    with pytest.raises(InputError, match=r"of another model: of 2.heads it has 0 channels, and this one 32"):
        build(project.argv(tmp_path / "other", *FULL, "--freeze_units", str(tmp_path / "fewer")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--frozen_units", "scu"], "frozen_units is given without freeze_units"),
        (["--freeze_units", "UNITS", "--frozen_units", "scp"], "did you mean 'scu'"),
        (["--freeze_units", "UNITS", "--frozen_units", "scu", "--trained_units", "ru"], "are both given"),
        (["--freeze_units", "nowhere"], "nowhere holds no units artifact"),
        (["--freeze_units", "UNITS", "--init", "pissa"], "freeze_units does not work with init pissa"),
        (["--freeze_units", "UNITS", "--adapter_path", "x"], "freeze_units does not work with adapter_path"),
        (["--freeze_units", "UNITS", "--use_dora", "true"], "freeze_units does not work with use_dora"),
    ],
)
def test_what_is_refused(project: Project, units: Path, tmp_path: Path, options: list[str], said: str) -> None:
    given = [str(units) if word == "UNITS" else word for word in options]
    with pytest.raises(InputError, match=said):
        align.main("sft", project.argv(tmp_path / "run", *given))
    assert not (tmp_path / "run").exists()


# The command


def test_the_command(project: Project, units: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = Units.load(units).provenance
    assert about["n_units"] == 3 * (32 + 32 + 32 + 48)
    assert about["sets"] == {"scu": 43, "ucu": 86, "ru": 86, "cu": 217}
    assert set(about["overlap"]) == set(SETS)
    assert all(about["overlap"][name] > about["by_chance"][name] for name in ("scu", "ucu", "ru"))
    run = tmp_path / "out"
    shutil.copytree(units, run / "units")
    sails(["units", *project.argv(run), *SHARES])
    printed = capsys.readouterr()
    assert "found with the same inputs" in printed.err
    assert "432 units" in printed.out
    assert "scu (safety-critical)" in printed.out
    with pytest.raises(InputError, match=r"holds other units \(different: scu_share \(0.1, now 0.2\)\)"):
        command.main([*project.argv(run), *SHARES, "--scu_share", "0.2"])


def test_a_trained_adapter_is_part_of_the_model(project: Project, units: Path, tmp_path: Path) -> None:
    align.main("sft", project.argv(tmp_path / "run", "--init", "default", "--save_strategy", "no"))
    command.main([*project.argv(tmp_path / "out", "--adapter_path", str(tmp_path / "run")), *SHARES])
    one, other = Units.load(units), Units.load(tmp_path / "out" / "units")
    assert other.provenance["identity"]["adapter"] is not None
    assert any(not torch.allclose(one.safety[key], other.safety[key]) for key in one.safety)


def test_data_without_harmless_requests(project: Project, tmp_path: Path) -> None:
    argv = project.argv(tmp_path / "out")
    where = argv.index("--helpful_dataset_name")
    with pytest.raises(InputError, match="no harmless requests to compare"):
        command.main(argv[:where] + argv[where + 2 :])
    with pytest.raises(InputError, match="the model is quantized"):
        command.main([*argv, "--load_in_8bit", "true"])
