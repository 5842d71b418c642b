"""Callbacks in real runs of transformers' Trainer on a tiny model, against dense matrices and runs without them."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sails_align.core.errors import InputError
from sails_align.core.linalg import orthonormalize, principal_angles
from sails_align.initializers.adapter import AdapterInit, initialize
from sails_align.subspace.basis import Subspace
from sails_align.training.callbacks import drift as drift_module
from sails_align.training.callbacks.decay import SubspaceDecay
from sails_align.training.callbacks.drift import DriftCallback, add_first
from sails_align.training.callbacks.learning_curve import LearningCurveCallback

D_MODEL, N_LAYERS, RANK = 32, 2, 4
DRIFT = {
    "adapter_update_norm",
    "adapter_A_norm",
    "adapter_B_norm",
    "adapter_energy_inside",
    "adapter_largest_angle",
}


def make(n_directions: int = RANK, **options: Any) -> tuple[PeftModel, AdapterInit]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=D_MODEL,
        intermediate_size=40,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=24,
        attention_dropout=0.1,
    )
    lora = LoraConfig(r=RANK, lora_alpha=12, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    basis_DR = torch.linalg.qr(torch.randn(D_MODEL, n_directions))[0]
    subspace = Subspace({0: basis_DR}, {0: torch.ones(n_directions)}, {})
    return model, initialize(model, subspace, **options)


def make_trainer(model: nn.Module, folder: Path, added: list[TrainerCallback], **options: Any) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 50, (16, 6), generator=generator)]
    defaults = {"max_steps": 6, "learning_rate": 0.02, "lr_scheduler_type": "constant", "logging_steps": 2}
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=4,
        seed=0,
        **(defaults | options),
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=added)


def basis_side(model: nn.Module, init: AdapterInit) -> dict[str, nn.Parameter]:
    return {m.name: model.get_parameter(f"{m.name}.lora_{m.side}.default.weight") for m in init.modules}


def largest_angle(model: nn.Module, init: AdapterInit) -> float:
    return DriftCallback(init).measure(model)["adapter_largest_angle"]


# --- decay


def test_a_decay_step_is_the_formula_with_each_parameters_own_rate():
    model, init = make()
    sides = basis_side(model, init)
    with torch.no_grad():
        for parameter in sides.values():
            parameter.add_(torch.randn_like(parameter))
    before = {name: parameter.detach().clone() for name, parameter in sides.items()}
    others = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, *rest = sides.values()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.01}])
    decay = SubspaceDecay(init, strength=3.0)
    state = (TrainingArguments(use_cpu=True, report_to="none"), TrainerState(), TrainerControl())
    Accelerator(cpu=True)  # as a Trainer makes
    decay.on_train_begin(*state, model=model)
    decay.on_optimizer_step(*state, optimizer=optimizer)
    for index, (name, parameter) in enumerate(sides.items()):
        rate = 0.3 if index == 0 else 0.03
        expected = before[name] - rate * (before[name] - init.initial[name])
        torch.testing.assert_close(parameter.detach(), expected)
    touched = {name for name, p in model.named_parameters() if not torch.equal(p, others[name])}
    assert len(touched) == len(sides)  # the base and the other factors are not


def test_decay_holds_the_subspace_and_its_strength_says_how_much(tmp_path):
    angles = {}
    for strength in (0.0, 10.0, 1000.0):  # times the rate of 0.02: none, 0.2, all the way
        model, init = make()
        added = [SubspaceDecay(init, strength)] if strength else []
        make_trainer(model, tmp_path, added).train()
        angles[strength] = largest_angle(model, init)
        if strength == 1000.0:
            assert all(torch.equal(p, init.initial[name]) for name, p in basis_side(model, init).items())
            assert all(p.any() for name, p in model.named_parameters() if "lora_" in name)  # the other side trains
    assert angles[0.0] > angles[10.0] > angles[1000.0]
    assert angles[1000.0] < 1e-3


def test_decay_follows_the_schedule(tmp_path):
    """With a rate that warms up from zero, the first step neither trains nor decays."""
    model, init = make()
    with torch.no_grad():
        for parameter in basis_side(model, init).values():
            parameter.add_(1.0)
    moved = {name: parameter.detach().clone() for name, parameter in basis_side(model, init).items()}
    options = {"max_steps": 1, "lr_scheduler_type": "linear", "warmup_steps": 10}
    make_trainer(model, tmp_path, [SubspaceDecay(init, 20.0)], **options).train()
    assert all(torch.equal(parameter, moved[name]) for name, parameter in basis_side(model, init).items())


@pytest.mark.parametrize("strength", [0.0, -1.0, math.nan])
def test_a_decay_that_is_not_positive_is_refused(strength):
    with pytest.raises(InputError, match="decay's strength"):
        SubspaceDecay(make()[1], strength)


# --- drift


def dense_drift(model: PeftModel, init: AdapterInit) -> dict[str, float]:
    """The same numbers from the updates as full matrices."""
    total = inside = angle = 0.0
    squares = {"A": 0.0, "B": 0.0}
    for module in init.modules:
        A, B = (model.get_parameter(f"{module.name}.lora_{side}.default.weight").detach().double() for side in "AB")
        update = 12 / RANK * B @ A
        update_DO = update.T if module.side == "A" else update
        first_DR = init.initial[module.name].T if module.side == "A" else init.initial[module.name]
        now_DR = A.T if module.side == "A" else B
        total += update.square().sum().item()
        basis_DR = orthonormalize(first_DR.double()[:, : module.n_directions])
        inside += (basis_DR.T @ update_DO).square().sum().item()
        squares = {"A": squares["A"] + A.square().sum().item(), "B": squares["B"] + B.square().sum().item()}
        angles_R = principal_angles(orthonormalize(first_DR.double()), orthonormalize(now_DR))
        angle = max(angle, angles_R.max().item())
    return {
        "adapter_update_norm": total**0.5,
        "adapter_A_norm": squares["A"] ** 0.5,
        "adapter_B_norm": squares["B"] ** 0.5,
        "adapter_energy_inside": inside / total if total else 0.0,
        "adapter_largest_angle": angle,
    }


@pytest.mark.parametrize("n_directions", [2, RANK, 6])
def test_drift_is_what_dense_matrices_say(n_directions, tmp_path):
    model, init = make(n_directions)
    drift = DriftCallback(init)
    start = drift.measure(model)
    assert start["adapter_update_norm"] == start["adapter_energy_inside"] == 0.0
    assert start["adapter_largest_angle"] < 1e-6
    make_trainer(model, tmp_path, []).train()
    measured = drift.measure(model)
    assert measured == pytest.approx(dense_drift(model, init), rel=1e-6, abs=1e-7)
    assert measured["adapter_largest_angle"] > 0.1
    assert 0.0 < measured["adapter_energy_inside"] < 1.0


def test_a_frozen_subspace_holds_all_of_the_update_unless_random_directions_fill_the_rank(tmp_path):
    inside = {}
    for n_directions in (2, RANK):
        model, init = make(n_directions, freeze=True)
        make_trainer(model, tmp_path, []).train()
        measured = DriftCallback(init).measure(model)
        assert measured["adapter_largest_angle"] < 1e-6
        assert measured["adapter_update_norm"] > 0.1
        inside[n_directions] = measured["adapter_energy_inside"]
    assert inside[RANK] == pytest.approx(1.0)
    assert inside[2] < 0.99


class Recorder(TrainerCallback):
    """Stands for a `report_to` callback: it keeps the logs that it is shown."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        self.rows.append(dict(logs))


def test_drift_is_in_the_training_rows_of_reports_and_of_the_history(tmp_path):
    model, init = make()
    recorder = Recorder()
    trainer = make_trainer(model, tmp_path, [recorder], eval_strategy="steps", eval_steps=3)
    add_first(trainer, DriftCallback(init))
    trainer.train()
    for rows in (recorder.rows, trainer.state.log_history):
        training = [row for row in rows if "loss" in row]
        assert len(training) == 3
        assert all(row.keys() >= DRIFT for row in training)
        assert training[0]["adapter_update_norm"] < training[-1]["adapter_update_norm"]
        assert not any(row.keys() & DRIFT for row in rows if "loss" not in row)
    assert any("eval_loss" in row for row in recorder.rows)


def test_an_ordinary_callback_is_too_late_for_reports(tmp_path):
    """A control on transformers: once this fails, `add_first` is not needed."""
    model, init = make()
    recorder = Recorder()
    make_trainer(model, tmp_path, [recorder, DriftCallback(init)], max_steps=2).train()
    assert not any(row.keys() & DRIFT for row in recorder.rows)


def test_drift_does_not_change_the_run(tmp_path):
    results = []
    for watched in (False, True):
        model, init = make()
        trainer = make_trainer(model, tmp_path, [], logging_steps=1)
        if watched:
            add_first(trainer, DriftCallback(init))
        trainer.train()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_drift_of_partitioned_parameters_is_not_logged_and_said_so(tmp_path, monkeypatch, caplog):
    model, init = make()
    with monkeypatch.context() as patch:
        patch.setattr(drift_module, "AcceleratorState", lambda: SimpleNamespace(distributed_type=DistributedType.FSDP))
        trainer = make_trainer(model, tmp_path, [DriftCallback(init)])
        trainer.train()
    assert "not logged" in caplog.text
    assert not any("adapter_update_norm" in row for row in trainer.state.log_history)


# --- probes


def test_probe_runs_before_the_first_and_after_every_nth_step(tmp_path):
    model, init = make()
    seen = []

    def probe(probed: nn.Module) -> dict[str, float]:
        seen.append((probed is model, probed.training, torch.is_grad_enabled()))
        return {"norm": DriftCallback(init).measure(probed)["adapter_update_norm"]}

    callback = LearningCurveCallback(2, probe)
    make_trainer(model, tmp_path, [callback], max_steps=5).train()
    assert [step for step, _ in callback.rows] == [0, 2, 4]
    assert set(seen) == {(True, False, False)}
    assert model.training
    norms = [values["norm"] for _, values in callback.rows]
    assert norms[0] == 0.0 < norms[1] < norms[2]
    assert callback.steps_to("norm", 0.0) == 0
    assert callback.steps_to("norm", norms[2]) == 4
    assert callback.steps_to("norm", 1e9) is None


def test_a_run_with_probes_is_the_same_run_as_one_without(tmp_path):
    results = []
    for probes in ([], [LearningCurveCallback(1, lambda model: {"x": torch.rand(7).sum().item()})]):
        model, _ = make()
        make_trainer(model, tmp_path, probes).train()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_resumed_run_is_not_probed_at_its_start():
    model, _ = make()
    callback = LearningCurveCallback(2, lambda model: {})
    state = TrainerState(global_step=3)
    callback.on_train_begin(TrainingArguments(use_cpu=True, report_to="none"), state, TrainerControl(), model=model)
    assert callback.rows == []


def test_a_probe_every_zero_steps_is_refused():
    with pytest.raises(InputError, match="every_n_steps is 0"):
        LearningCurveCallback(0, lambda model: {})
