"""Losses that are built on TRL's: in real trainings, against sums computed from logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Built, Project, build
from torch import Tensor
from trl import SFTTrainer

from sails_align.core.errors import InputError
from sails_align.core.registry import Entry
from sails_align.training import run as align
from sails_align.training.losses import LOSSES
from sails_align.training.losses.compose import LossStep, with_loss
from sails_align.training.losses.first_tokens import first_tokens

QUICK = ("--init", "default", "--num_train_epochs", "1", "--logging_steps", "1")
LABELS = st.lists(st.lists(st.booleans(), min_size=2, max_size=12), min_size=1, max_size=3)


def trained(project: Project, folder: Path, *options: str) -> Built:
    built = build(project.argv(folder, *QUICK, *options))
    built.trainer.train()
    return built


def adapter(built: Built) -> Tensor:
    model: Any = built.trainer.model
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name])


def test_with_weight_1_it_is_trls_training_bit_for_bit_and_with_another_it_is_not(project: Project, tmp_path: Path):
    options = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    plain = adapter(trained(project, tmp_path, *options))
    for weight, is_same in (("1", True), ("3", False)):
        weighted = trained(project, tmp_path, *options, "--loss", "first_tokens", "--first_tokens_weight", weight)
        assert torch.equal(adapter(weighted), plain) == is_same
        rows = [row for row in weighted.trainer.state.log_history if "loss" in row]
        assert all(row["first_tokens_loss"] > 0 for row in rows)


@pytest.mark.parametrize(("k", "weight"), [(2, 3.0), (1, 0.0), (50, 0.5)])
def test_it_is_the_weighted_sum_of_the_definition(project: Project, tmp_path: Path, k: int, weight: float):
    names = ("--loss", "first_tokens", "--first_tokens", str(k), "--first_tokens_weight", str(weight))
    trainer: Any = build(project.argv(tmp_path, *QUICK, *names)).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    with torch.no_grad():
        found = trainer.compute_loss(model, dict(batch))
        logits_BSV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    total, n = 0.0, 0
    for row, labels in enumerate(batch["labels"].tolist()):
        seen = 0
        for position, label in enumerate(labels):
            if label != -100:
                log_probs_V = logits_BSV[row, position - 1].log_softmax(-1)
                total -= (weight if seen < k else 1.0) * log_probs_V[label].item()
                seen, n = seen + 1, n + 1
    assert found.item() == pytest.approx(total / n, rel=1e-5)


def test_the_held_out_loss_is_trls(project: Project, tmp_path: Path):
    losses = []
    for options in ((), ("--loss", "first_tokens", "--first_tokens_weight", "9")):
        trainer: Any = build(project.argv(tmp_path, *QUICK, *options)).trainer
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


@settings(max_examples=60, deadline=None)
@given(LABELS, st.integers(1, 4), st.booleans())
def test_which_tokens_are_first(rows: list[list[bool]], k: int, packed: bool):
    """With packing, all examples are in one row, and each has its own first tokens."""
    expected = [[is_trained and sum(row[:i]) < k for i, is_trained in enumerate(row)] for row in rows]
    length = max(map(len, rows))
    labels = [[1 if is_trained else -100 for is_trained in row] for row in rows]
    if packed:
        labels = [[label for row in labels for label in row]]
        expected = [[is_first for row in expected for is_first in row]]
        batch = {"position_ids": torch.tensor([[i for row in rows for i in range(len(row))]])}
    else:
        labels = [row + [-100] * (length - len(row)) for row in labels]
        expected = [row + [False] * (length - len(row)) for row in expected]
        batch = {}
    found = first_tokens({"labels": torch.tensor(labels), **batch}, k)
    assert found.tolist() == [row[1:] for row in expected]


STEPS: list[LossStep] = []


class Half:
    """A loss that halves TRL's."""

    def __init__(self, options: None, training: Any) -> None:
        pass

    def begin(self, trainer: Any) -> None:
        pass

    def __call__(self, step: LossStep) -> Tensor:
        STEPS.append(step)
        return step.loss / 2


def test_dpo_takes_a_loss_which_sees_the_policys_outputs(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(LOSSES, "_entries", {"half": Entry(f"{__name__}:Half", "For this test.")})
    more = ("--init", "default", "--max_steps", "1")
    plain: Any = build(project.dpo_argv(tmp_path, *more), method="dpo").trainer
    halved: Any = build(project.dpo_argv(tmp_path, *more, "--loss", "half"), method="dpo").trainer
    batch = next(iter(halved.get_train_dataloader()))
    losses = [trainer.compute_loss(trainer.model.train(), dict(batch)).item() for trainer in (plain, halved)]
    assert losses[1] == pytest.approx(losses[0] / 2)
    (step,) = STEPS
    assert step.outputs.log_probs.requires_grad
    assert step.outputs.log_probs.shape == (len(batch["input_ids"]), batch["input_ids"].shape[1] - 1)


def test_without_a_loss_the_class_is_trls_own():
    assert with_loss(SFTTrainer, None) is SFTTrainer


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("sft", ["--loss", "first_token"], "there is no loss 'first_token'; did you mean 'first_tokens'?"),
        ("dpo", ["--loss", "first_tokens"], "is for SFT only"),
        ("sft", ["--loss", "first_tokens", "--loss_type", "dft"], "loss_type is dft"),
        ("sft", ["--first_tokens", "0"], "first_tokens is 0; choose 1 or more"),
        ("sft", ["--first_tokens_weight", "nan"], "first_tokens_weight is nan"),
    ],
)
def test_losses_that_cannot_be_used(project: Project, tmp_path: Path, method: Any, options: list[str], said: str):
    with pytest.raises(InputError) as refused:
        align.parse(method, project.argv(tmp_path, *options))
    assert said in str(refused.value)


def test_the_loss_is_part_of_the_runs_identity(project: Project, tmp_path: Path):
    built = build(project.argv(tmp_path, *QUICK, "--loss", "first_tokens"))
    chosen = {"first_tokens": 5, "first_tokens_weight": 3.0}
    assert built.args.to_json()["loss"] == {"name": "first_tokens", **chosen}
    assert {"loss": "first_tokens", **chosen}.items() <= built.identity()["options"].items()
