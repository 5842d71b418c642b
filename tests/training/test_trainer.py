"""What trainers start from: every initialization, in SFT and DPO, against the base model and the reference."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import RANK, SAE_LAYERS, Built, Project, adapter_weights, base_logits, build, distance, logits
from transformers import AutoModelForCausalLM
from trl.trainer import utils

from sails_align.initializers import INITIALIZERS, subspace_initializers
from sails_align.subspace.options import Method
from sails_align.training import run as align
from sails_align.training.save import save_model

# What training starts from


ADDED = [name for name, entry in INITIALIZERS.items() if entry.exact]
"""Initializations that add exactly zero to an untouched base."""


def first_step(built: Built) -> dict[str, float]:
    """The logs of one optimizer step."""
    built.trainer.train()
    return next(row for row in built.trainer.state.log_history if "loss" in row)


@pytest.mark.parametrize("init", ADDED)
def test_starts_as_the_base_model_and_learns(project: Project, tmp_path: Path, init: str) -> None:
    built = build(project.argv(tmp_path, "--init", init))
    expected = base_logits(project)
    assert torch.equal(logits(built.trainer.model), expected)
    assert (built.init is None) == (built.subspace is None) == (init not in subspace_initializers())
    built.trainer.train()
    assert not torch.allclose(logits(built.trainer.model), expected, atol=1e-3)
    with built.trainer.model.disable_adapter():
        assert torch.equal(logits(built.trainer.model), expected)


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
def test_others_start_as_the_base_model_up_to_rounding(project: Project, tmp_path: Path, init: str) -> None:
    built = build(project.argv(tmp_path, "--init", init))
    expected = base_logits(project)
    torch.testing.assert_close(logits(built.trainer.model), expected, atol=1e-5, rtol=1e-5)
    with built.trainer.model.disable_adapter():
        changed = not torch.allclose(logits(built.trainer.model), expected, atol=1e-3)
    assert changed == (init != "orthogonal")  # which is why DPO cannot switch these off for its reference


@pytest.mark.parametrize("precompute", ["false", "true"])
@pytest.mark.parametrize("start", [*INITIALIZERS.names(), "full"])
def test_dpo_starts_at_its_reference(project: Project, tmp_path: Path, start: str, precompute: str) -> None:
    option = ["--use_peft", "false"] if start == "full" else ["--init", start]
    argv = project.dpo_argv(tmp_path, *option, "--precompute_ref_log_probs", precompute)
    row = first_step(build([*argv, "--max_steps", "1", "--logging_steps", "1"], method="dpo"))
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    # Log-probabilities computed beforehand are of other batches, whose padding rounds differently.
    assert abs(row["rewards/chosen"]) <= (1e-5 if precompute == "true" else 0)
    assert abs(row["rewards/rejected"]) <= (1e-5 if precompute == "true" else 0)


def test_pairs_are_batched_by_length(project: Project, tmp_path: Path) -> None:
    pairs = [{"prompt": f"ask {i}", "chosen": "sorry" + " no" * (i % 8), "rejected": "you can"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def padded(strategy: str) -> int:
        options = ("--train_sampling_strategy", strategy, "--dataset_name", str(tmp_path / "pairs.jsonl"))
        options += ("--init", "default", "--helpful_ratio", "0", "--max_steps", "1")
        trainer = build(project.dpo_argv(tmp_path / strategy, *options), method="dpo").trainer
        trainer.evaluate()
        trainer.train()
        return sum(batch["input_ids"].numel() for batch in trainer.get_train_dataloader())

    n_random, n_by_length, _ = padded("random"), padded("group_by_length"), padded("batch_rebalance")
    assert n_by_length < n_random


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_only_labelled_positions_are_scored(
    project: Project, tmp_path: Path, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = project.argv(tmp_path) if method == "sft" else project.dpo_argv(tmp_path)
    trainer = build([*argv, "--init", "default"], method=method).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    score, scored = utils._ChunkedLogProbFunction.apply, []

    def record(states: torch.Tensor, *others: Any) -> Any:
        scored.append(len(states))
        return score(states, *others)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", record)
    loss = trainer.compute_loss(trainer.model, batch)
    monkeypatch.setattr(utils, "_use_triton", lambda device: False)  # as TRL has it on a CPU
    everywhere = trainer.compute_loss(trainer.model, batch)
    of, everything = scored[0], scored[-1]
    assert 0 < of < everything == batch["input_ids"][:, 1:].numel()
    torch.testing.assert_close(loss, everywhere)
    if method == "sft":
        assert of == int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_with_the_adapter_off_their_reference_would_be_wrong(project: Project, tmp_path: Path, init: str) -> None:
    """A control: without the copy of the adapter, TRL's reference is the model whose base weights were changed."""
    argv = project.dpo_argv(tmp_path, "--init", init, "--max_steps", "1", "--logging_steps", "1")
    built = build(argv, method="dpo")
    del built.trainer.model.peft_config["ref"]
    row = first_step(built)
    assert abs(row["rewards/chosen"]) > 1e-4


def test_dpo_from_a_trained_adapter_has_that_model_as_its_reference(project: Project, tmp_path: Path) -> None:
    align.main("sft", project.argv(tmp_path / "sft"))
    trained = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    argv = project.dpo_argv(tmp_path / "dpo", "--adapter_path", str(tmp_path / "sft"), "--logging_steps", "1")
    built = build(argv, method="dpo")
    assert distance(adapter_weights(built.trainer), trained) == 0
    at_start = logits(built.trainer.model)
    assert not torch.allclose(at_start, base_logits(project), atol=1e-3)
    row = first_step(built)
    assert row["rewards/chosen"] == row["rewards/rejected"] == 0
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert distance(adapter_weights(built.trainer), trained) > 1e-3
    built.trainer.model.set_adapter("ref")
    assert torch.equal(logits(built.trainer.model), at_start)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_what_they_save_is_plain_lora_of_the_untouched_base(
    project: Project, tmp_path: Path, method: Method, init: str
) -> None:
    built = build((project.argv if method == "sft" else project.dpo_argv)(tmp_path, "--init", init), method=method)
    built.trainer.train()
    expected = logits(built.trainer.model)
    save_model(built.args, built.trainer, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(project.folder / "tiny")
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert loaded.peft_config["default"].init_lora_weights is True
    assert loaded.peft_config["default"].r == 2 * RANK
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, base_logits(project), atol=1e-3)
    assert not (tmp_path / "initial_adapter").exists()


def test_eva_finds_what_varies_in_the_input(project: Project, tmp_path: Path) -> None:
    """Rows of lora_A are orthonormal and explain more of the inputs of a module than random ones do."""
    built = build(project.argv(tmp_path, "--init", "eva"))
    module = built.trainer.model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    A_RD = module.lora_A["default"].weight.detach().cpu()
    torch.testing.assert_close(A_RD @ A_RD.T, torch.eye(RANK), atol=1e-4, rtol=1e-4)
    inputs = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().cpu().flatten(0, 1)))
    logits(built.trainer.model)
    handle.remove()
    hidden_TD = inputs[0] - inputs[0].mean(0)
    random_RD = torch.linalg.qr(torch.randn(hidden_TD.shape[1], RANK, generator=torch.Generator().manual_seed(0)))[0].T
    assert (hidden_TD @ A_RD.T).norm() > 1.2 * (hidden_TD @ random_RD.T).norm()


def test_full_fine_tuning(project: Project, tmp_path: Path) -> None:
    metrics = align.main("sft", project.argv(tmp_path, "--use_peft", "false"))
    assert metrics["cost"]["trainable_share"] == 1
    assert metrics["trained"]["held_out_loss"] < metrics["base"]["held_out_loss"]
    assert not (tmp_path / "adapter_config.json").exists()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.allclose(logits(saved), base_logits(project), atol=1e-3)


def test_plain_lora_is_pefts_own(project: Project, tmp_path: Path) -> None:
    weights = adapter_weights(build(project.argv(tmp_path, "--init", "default")).trainer)
    for name, value in weights.items():
        if "lora_B" in name:
            assert not value.any()
        else:  # Kaiming's bound with a = sqrt(5)
            assert 0.5 < value.abs().max() * value.shape[1] ** 0.5 <= 1
    other = adapter_weights(build(project.argv(tmp_path, "--init", "default", "--seed", "1")).trainer)
    assert distance(weights, other) > 0.01


def test_the_directions_are_where_they_belong(project: Project, tmp_path: Path) -> None:
    built = build(project.argv(tmp_path))
    assert built.subspace is not None
    weights = adapter_weights(built.trainer)
    for module, layer in {"layers.1.self_attn.q_proj": 0, "layers.2.self_attn.v_proj": 1}.items():
        basis_DR = built.subspace.bases[layer][:, :RANK]
        factor_RD = weights[f"base_model.model.model.{module}.lora_A.weight"]
        torch.testing.assert_close(factor_RD[: basis_DR.shape[1]], basis_DR.T)
    assert built.subspace.writers is not None  # the default preset's contrast is split
    basis_DR = built.subspace.writers[1][:, :RANK]
    factor_DR = weights["base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"]
    torch.testing.assert_close(factor_DR[:, : basis_DR.shape[1]], basis_DR)


def test_sae_only_leaves_other_layers_without_adapter(project: Project, tmp_path: Path) -> None:
    weights = adapter_weights(build(project.argv(tmp_path, "--layer_map", "sae_only")).trainer)
    modules = {name.removeprefix("base_model.model.model.layers.").rpartition(".lora")[0] for name in weights}
    readers = {f"{layer + 1}.self_attn.{name}" for layer in SAE_LAYERS for name in ("q_proj", "k_proj", "v_proj")}
    assert modules == readers | {f"{layer}.self_attn.o_proj" for layer in SAE_LAYERS}


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("mode", ["init", "freeze", "decay"])
def test_subspace_modes(project: Project, tmp_path: Path, mode: str, method: Method) -> None:
    strength = ["--subspace_decay", "100"] if mode == "decay" else []  # times the rate, 0.01: all the way back
    argv = project.dpo_argv(tmp_path, "--subspace_mode", mode, *strength, "--lr_scheduler_type", "constant")
    built = build([*argv, "--warmup_steps", "0"], method=method)
    assert built.init is not None
    with built.trainer.model.disable_adapter():  # PEFT unfreezes what it disables
        pass
    before = adapter_weights(built.trainer)
    built.trainer.train()
    after = adapter_weights(built.trainer)
    sides = {f"{module.name}.lora_{module.side}.weight" for module in built.init.modules}
    assert sides < before.keys()
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert all(moved[name] > 1e-3 for name in moved.keys() - sides)
    assert all(moved[name] == 0 if mode == "freeze" else moved[name] < 1e-6 for name in sides) == (mode != "init")
