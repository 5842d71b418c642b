"""The average of the weights: its formula, its limits, what it is not, and that a resumed run has the same one."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from tiny import Project, build, distance
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sails_align.core.errors import InputError
from sails_align.training import run as align
from sails_align.training.callbacks import engines
from sails_align.training.callbacks.ema import WeightAverage, eta_of
from sails_align.training.checkpoints import train

FULL = ["--use_peft", "false", "--learning_rate", "0.001"]


class Led(nn.Module):
    """One parameter that is led along a path."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


def follow(average: WeightAverage, model: Led, steps: list[Tensor]) -> None:
    """Let the callback see the parameter at each of the steps."""
    events = (TrainingArguments(use_cpu=True, report_to="none"), TrainerState(), TrainerControl())
    Accelerator(cpu=True)  # as a Trainer makes
    average.on_train_begin(*events, model=model)
    for value in steps:
        model.weight.data.copy_(value)
        average.on_step_end(*events, model=model)
    average.on_train_end(*events, model=model)


# The formula


def test_the_average_of_three_steps() -> None:
    model, eta = Led(), 0.7
    start, steps = model.weight.detach().clone(), [torch.tensor(each).double() for each in ([3, 0], [5, 1], [-4, 2])]
    follow(WeightAverage(eta), model, steps)
    weighted = sum((1 - eta) * eta ** (2 - t) * value for t, value in enumerate(steps))
    torch.testing.assert_close(model.weight.detach(), eta**3 * start + weighted, atol=1e-12, rtol=0)
    # A shadow that starts at zero, as the moments of Adam do, is another.
    assert (model.weight - weighted).abs().max() > 0.1


def test_after_the_half_life_half_of_the_start_is_left() -> None:
    for half_life in (0.5, 1, 7, 1000):
        assert eta_of(half_life) ** half_life == pytest.approx(0.5)
    model, start = Led(), Led().weight.detach()
    follow(WeightAverage(eta_of(3)), model, [torch.zeros(2, dtype=torch.float64)] * 3)
    torch.testing.assert_close(model.weight.detach(), start / 2, atol=1e-12, rtol=0)


def test_with_constant_steps_the_last_ones_are_left_out() -> None:
    """The distance moved is that of T - eta / (1 - eta) steps, once T is long against the half-life."""
    model, eta, T = Led(), eta_of(5), 100
    start = model.weight.detach().clone()
    follow(WeightAverage(eta), model, [start + t for t in range(1, T + 1)])
    moved = T - eta / (1 - eta) * (1 - eta**T)
    torch.testing.assert_close(
        model.weight.detach() - start, torch.full((2,), moved, dtype=torch.float64), atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_replacing_the_weights_at_every_step_is_a_smaller_learning_rate(optimizer: str) -> None:
    """Which is why that is not what is done: here with both moments, and the average put back after each step."""
    eta, results = 0.8, []
    for rate, replaced in ((0.05, True), (0.05 * (1 - eta), False), (0.05, False)):
        weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        steps = getattr(torch.optim, optimizer)([weight], lr=rate, weight_decay=0.1)
        shadow = weight.detach().clone()
        for t in range(20):
            steps.zero_grad()
            (weight**4 + (t % 3) * weight).sum().backward()
            steps.step()
            if replaced:
                shadow.lerp_(weight.detach(), 1 - eta)
                weight.data.copy_(shadow)
        results.append(weight.detach())
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=0)
    assert (results[0] - results[2]).abs().max() > 0.1


def test_the_average_of_bfloat16_weights_is_kept_in_float32() -> None:
    """Steps of less than 2^-8 of a weight, which bfloat16 has no room for, add up."""
    average, model = WeightAverage(0.999), Led(torch.bfloat16)
    follow(average, model, [torch.tensor([3.0, -2.0])] * 500)
    assert average.shadow.keys() == {"weight"}
    assert average.shadow["weight"].dtype == torch.float32
    assert average.shadow["weight"][0].item() == pytest.approx(3 - 2 * 0.999**500, abs=1e-4)
    in_bfloat16 = torch.tensor(1.0, dtype=torch.bfloat16)
    for _ in range(500):
        in_bfloat16.lerp_(torch.tensor(3.0, dtype=torch.bfloat16), 0.001)
    assert in_bfloat16 == 1


# In trainings


class Recorder(TrainerCallback):
    """The trained weights after each step, before the average takes their place."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self.steps.append({n: p.detach().double().clone() for n, p in model.named_parameters() if p.requires_grad})


def files(run: Path) -> dict[str, Tensor]:
    name = "adapter_model.safetensors" if (run / "adapter_config.json").exists() else "model.safetensors"
    return load_file(run / name)


@pytest.mark.parametrize("options", [["--init", "default"], FULL], ids=["adapter", "full"])
def test_without_memory_it_is_plain_training_and_with_nothing_else_the_start(
    project: Project, tmp_path: Path, options: list[str]
) -> None:
    weights = {}
    for eta in (None, 0.0, 1.0):
        trainer = build(project.argv(tmp_path / str(eta), *options, "--save_strategy", "no")).trainer
        if eta is not None:
            trainer.add_callback(WeightAverage(eta))
        start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        weights[eta] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert distance(weights[0.0], weights[None]) == 0
    assert distance(weights[1.0], start) == 0
    assert distance(weights[None], start) > 1e-3


def test_batches_that_are_accumulated_count_as_one_step(project: Project, tmp_path: Path) -> None:
    recorder = Recorder()
    more = ["--init", "default", "--ema_half_life", "2", "--gradient_accumulation_steps", "3", "--max_steps", "4"]
    trainer = build(project.argv(tmp_path, *more, "--per_device_train_batch_size", "2"), [recorder]).trainer
    eta, parameters = eta_of(2), dict(trainer.model.named_parameters())
    expected = {name: p.detach().double().clone() for name, p in parameters.items() if p.requires_grad}
    trainer.train()
    assert len(recorder.steps) == 4
    for step in recorder.steps:
        expected = {name: eta * value + (1 - eta) * step[name] for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name].detach().double(), value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["freeze", "init"])
def test_the_average_of_an_adapter_is_that_of_its_product_if_one_side_is_frozen(
    project: Project, tmp_path: Path, mode: str
) -> None:
    recorder = Recorder()
    more = ["--subspace_mode", mode, "--ema_half_life", "2", "--save_strategy", "no", "--max_steps", "12"]
    trainer = build(project.argv(tmp_path, *more), [recorder]).trainer
    eta, model = eta_of(2), trainer.model
    start = {name: p.detach().double().clone() for name, p in model.named_parameters() if "lora_" in name}
    trainer.train()
    now, worst = dict(model.named_parameters()), 0.0
    for name in [name for name in start if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        product = torch.zeros(len(start[other]), start[name].shape[1], dtype=torch.float64)
        for step in recorder.steps:
            B_A = step.get(other, start[other]) @ step.get(name, start[name])
            product = eta * product + (1 - eta) * B_A
        worst = max(worst, (now[other].double() @ now[name].double() - product).abs().max().item())
    assert worst < 1e-6 if mode == "freeze" else worst > 1e-4


@pytest.mark.parametrize(
    ("method", "options"),
    [("sft", ["--lora_dropout", "0.1"]), ("sft", FULL), ("dpo", ["--init", "default"]), ("dpo", FULL)],
    ids=["sft", "sft full", "dpo", "dpo full"],
)
def test_a_resumed_run_has_the_same_average(project: Project, tmp_path: Path, method: Any, options: list[str]) -> None:
    argv = project.argv if method == "sft" else project.dpo_argv
    options = [*options, "--ema_half_life", "4", "--eval_examples", "2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    metrics = align.main(method, argv(whole, *options))
    shadow = load_file(whole / "checkpoint-6" / "ema.safetensors")
    assert not any("ref" in name for name in shadow), "DPO's reference is not trained"
    saved, last = files(whole), files(whole / "checkpoint-6")
    for name, value in shadow.items():
        assert torch.equal(saved[name.replace(".default", "")], value)
    assert distance(saved, last) > 1e-4, "checkpoints have the weights, so that training goes on from them"
    assert "| ema_half_life | `4.0` |" in (whole / "README.md").read_text()
    shutil.copytree(whole / "checkpoint-4", broken / "checkpoint-4")
    resumed = align.main(method, argv(broken, *options, "--resume_from_checkpoint", "true"))
    assert distance(load_file(broken / "checkpoint-6" / "ema.safetensors"), shadow) == 0
    assert distance(files(broken), saved) == 0
    assert resumed["trained"]["held_out_loss"] == metrics["trained"]["held_out_loss"]
    with pytest.raises(InputError, match=r"different: ema_half_life \(4.0, now 5.0\)"):
        align.main(method, argv(broken, *options, "--ema_half_life", "5", "--resume_from_checkpoint", "true"))


def test_what_is_measured_is_the_average(project: Project, tmp_path: Path) -> None:
    options = ["--init", "default", "--save_strategy", "no"]
    losses = {}
    for half_life in (None, "1e9"):
        more = [] if half_life is None else ["--ema_half_life", half_life]
        metrics = align.main("sft", project.argv(tmp_path / str(half_life), *options, *more))
        losses[half_life] = metrics["base"]["held_out_loss"], metrics["trained"]["held_out_loss"]
    assert losses["1e9"][1] == pytest.approx(losses["1e9"][0], abs=1e-5)
    assert losses[None][1] < losses[None][0] - 0.1


def test_the_pissa_adapter_that_is_saved_holds_the_average(project: Project, tmp_path: Path) -> None:
    """It is the difference from the start: of an average that has not moved, nothing."""
    align.main("sft", project.argv(tmp_path, "--init", "pissa", "--ema_half_life", "1e12"))
    saved = files(tmp_path)
    for name in [name for name in saved if "lora_A" in name]:
        assert (saved[name.replace("lora_A", "lora_B")] @ saved[name]).abs().max() < 1e-5


# What is refused


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_a_share_that_is_none(eta: float) -> None:
    with pytest.raises(InputError, match="choose a value from 0"):
        WeightAverage(eta)


def test_engines_that_hold_parts_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        monkeypatch.setattr(engines, "AcceleratorState", lambda kind=engine: SimpleNamespace(distributed_type=kind))
        with pytest.raises(InputError, match=f"does not work with {engine.value}"):
            follow(WeightAverage(0.5), Led(), [])


def test_checkpoints_without_the_average(project: Project, tmp_path: Path) -> None:
    options = ["--init", "default", "--max_steps", "2"]
    build(project.argv(tmp_path / "run", *options)).trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    trainer = build(project.argv(tmp_path / "other", *options, "--ema_half_life", "2")).trainer
    for content, said in ((None, "there is no "), ({"weight": torch.zeros(2)}, "is of other weights than are trained")):
        if content is not None:
            save_file(content, checkpoint / "ema.safetensors")
        with pytest.raises(InputError, match=said):
            train(trainer, str(checkpoint))
    (checkpoint / "ema.safetensors").write_bytes(b"half a file")
    with pytest.raises(InputError, match="is damaged"):
        train(trainer, str(checkpoint))


def test_a_trainer_of_ones_own_resumes_too(project: Project, tmp_path: Path) -> None:
    from transformers import Trainer

    def make() -> Trainer:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(project.folder / "tiny")
        rows = [{"input_ids": [i, 5, 9], "labels": [i, 5, 9]} for i in range(16)]
        arguments = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", max_steps=6, save_steps=3, disable_tqdm=True
        )
        return Trainer(model, arguments, train_dataset=rows, callbacks=[WeightAverage(0.9)])  # pyright: ignore[reportArgumentType]

    whole, resumed = make(), make()
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed.train(resume_from_checkpoint=True)
    assert distance(dict(resumed.model.state_dict()), dict(whole.model.state_dict())) == 0
