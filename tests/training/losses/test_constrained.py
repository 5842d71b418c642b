"""The loss `constrained`: its identities, its reference, and that it holds first tokens."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import Built, Project, adapter_weights, build, distance
from torch import Tensor
from torch.nn import functional

from sails_align.core.errors import InputError
from sails_align.training import run as align
from sails_align.training.checkpoints import find_checkpoint, train
from sails_align.training.losses.constrained import Constrained, beyond_cross_entropy
from sails_align.training.losses.options import ConstrainedOptions

QUICK = ("--init", "default", "--logging_steps", "1", "--loss", "constrained")
FULL = ("--use_peft", "false", "--logging_steps", "1", "--loss", "constrained")
FREE = ("--constrained_first_betas", "0", "--constrained_beta", "0")
LOG_PROBS = st.floats(-30, 0)


@settings(deadline=None)
@given(LOG_PROBS, LOG_PROBS, st.floats(1e-3, 20))
def test_the_gradient_is_cross_entropys_with_the_papers_weight(log_prob: float, reference: float, beta: float):
    p, beta_ = torch.tensor(log_prob, dtype=torch.float64, requires_grad=True), torch.tensor(beta, dtype=torch.float64)
    loss = -p + beyond_cross_entropy(p - reference, beta_)
    (gradient,) = torch.autograd.grad(loss, p)
    weight = 2 * (1 - torch.sigmoid(beta_ * (p.detach() - reference)))
    assert gradient.item() == pytest.approx(-weight.item(), abs=1e-10)
    papers = -2 / beta_ * functional.logsigmoid(beta_ * (p - reference))
    constant = -2 / beta * math.log(2) - reference
    assert (loss - papers).item() == pytest.approx(constant, abs=1e-8)


def test_where_nothing_has_changed_and_for_beta_0_it_is_the_cross_entropy():
    difference = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    free = beyond_cross_entropy(difference, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(free, torch.zeros(3, dtype=torch.float64))
    assert torch.autograd.grad(free.sum(), difference)[0].abs().max() == 0
    held = beyond_cross_entropy(difference, torch.full((3,), 2.0, dtype=torch.float64))
    assert held[1].item() == pytest.approx(0, abs=1e-15)
    (gradient,) = torch.autograd.grad(held.sum(), difference)
    assert gradient[1].item() == pytest.approx(0, abs=1e-15)
    assert gradient[2] > 0.9, "control: what has become likelier is hardly learned further"
    tiny = beyond_cross_entropy(difference, torch.full((3,), 1e-6, dtype=torch.float64))
    assert tiny.abs().max().item() < 1e-5, "the limit"


def test_with_beta_0_it_is_trls_training_bit_for_bit_and_with_the_papers_it_is_not(project: Project, tmp_path: Path):
    def trained(*more: str) -> dict[str, Tensor]:
        built = build(project.argv(tmp_path, "--init", "default", "--max_steps", "3", *more))
        built.trainer.train()
        return adapter_weights(built.trainer)

    plain = trained()
    assert distance(trained("--loss", "constrained", *FREE), plain) == 0
    assert distance(trained("--loss", "constrained"), plain) > 0


def log_probs(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The log-probability of each next token, and which of them are learned. (B, S - 1)"""
    with torch.no_grad():
        logits_BSV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    labels_BS = batch["labels"][:, 1:]
    all_BSV = logits_BSV[:, :-1].log_softmax(-1)
    return all_BSV.gather(-1, labels_BS.clamp(min=0)[..., None])[..., 0], labels_BS != -100


@pytest.mark.parametrize("start", [QUICK, FULL])
def test_it_is_the_sum_of_the_definition(project: Project, tmp_path: Path, start: tuple[str, ...]):
    betas = ("--constrained_first_betas", "0.5", "3", "--constrained_beta", "0.25")
    trainer: Any = build(project.argv(tmp_path, *start, *betas, "--lora_dropout", "0")).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    reference_BS, learned_BS = log_probs(model, batch)
    with torch.no_grad():
        first = trainer.compute_loss(model, dict(batch)).item()
    assert first == pytest.approx(-reference_BS[learned_BS].mean().item(), rel=1e-5), "TRL's, where nothing has changed"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.1 if start is FULL else 4))
    found_BS, _ = log_probs(model, batch)
    total = 0.0
    for row, learned in enumerate(learned_BS.tolist()):
        seen = 0
        for position in (i for i, is_learned in enumerate(learned) if is_learned):
            beta, seen = [0.5, 3, *[0.25] * 99][seen], seen + 1
            d = found_BS[row, position] - reference_BS[row, position]
            softplus = functional.softplus(-beta * d) - math.log(2)
            total += (2 / beta * softplus - reference_BS[row, position]).item()
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch)).item()
    assert loss == pytest.approx(total / learned_BS.sum().item(), rel=1e-4)
    assert loss != pytest.approx(-found_BS[learned_BS].mean().item(), rel=5e-4)
    assert model.training


def kept_start(built: Built) -> dict[str, Tensor]:
    (cell,) = (
        cell.cell_contents
        for cell in type(built.trainer).compute_loss.__closure__ or ()
        if isinstance(cell.cell_contents, Constrained)
    )
    assert cell._start is not None
    return cell._start


def test_a_resumed_training_has_the_same_reference(project: Project, tmp_path: Path):
    argv = project.argv(tmp_path / "run", *QUICK, "--max_steps", "4", "--save_total_limit", "9")
    align.main("sft", argv)
    whole = load_file(tmp_path / "run" / "adapter_model.safetensors")
    plain = build(argv)
    resumed = build([*argv, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")])
    train(resumed.trainer, find_checkpoint(resumed.args.training, resumed.identity()))
    assert distance(kept_start(plain), kept_start(resumed)) == 0
    assert distance(adapter_weights(resumed.trainer), whole) < 1e-6
    assert distance(adapter_weights(resumed.trainer), adapter_weights(plain.trainer)) > 1e-3


def test_first_tokens_stay_nearer_to_what_they_were(project: Project, tmp_path: Path):
    """The more they are held, the less their probabilities change, in as many steps at the same rate."""
    changes = []
    for first in ("0", "2", "20"):
        held = ("--constrained_first_betas", first, first, "--constrained_beta", "0", "--max_grad_norm", "0")
        built = build(project.argv(tmp_path, *QUICK, *held, "--optim", "sgd", "--learning_rate", "0.5"))
        trainer: Any = built.trainer
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
        batch = {name: values.to(trainer.model.device) for name, values in batch.items()}
        before_BS, learned_BS = log_probs(trainer.model.eval(), batch)
        trainer.train()
        after_BS, _ = log_probs(trainer.model.eval(), batch)
        is_first_BS = learned_BS & (learned_BS.cumsum(1) <= 2)
        changes.append((after_BS - before_BS)[is_first_BS].mean().item())
        if first != "0":
            weights = [row["constrained_weight"] for row in trainer.state.log_history if "constrained_weight" in row]
            assert weights[0] == pytest.approx(1, abs=1e-5)
            assert 0 < weights[-1] < 1
    assert changes[0] > changes[1] > changes[2] > 0


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("dpo", (), "loss is constrained, which is for SFT only"),
        ("sft", ("--loss_type", "dft"), "loss_type is dft"),
        ("sft", ("--torch_compile", "true"), "torch_compile is true, which its reference cannot do"),
        ("sft", ("--constrained_beta", "-1"), r"constrained_beta is -1\.0; choose 0 or more"),
        ("sft", ("--constrained_first_betas", "1", "nan"), r"constrained_first_betas is \[1\.0, nan\]"),
    ],
)
def test_what_it_cannot_be_used_with(
    project: Project, tmp_path: Path, method: Any, options: tuple[str, ...], said: str
):
    with pytest.raises(InputError, match=said):
        align.parse(method, project.argv(tmp_path, *QUICK[2:], *options))


def test_betas_with_packing_are_of_the_places_in_each_example():
    loss: Any = Constrained.__new__(Constrained)
    loss._first, loss._other = ConstrainedOptions().constrained_first_betas[:2], 0.1
    labels = torch.tensor([[-100, -100, 5, 6, 7, -100, 8, 9]])
    packed = {"labels": labels, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])}
    assert loss.betas(packed)[0].tolist() == pytest.approx([0, 0.5, 2, 0.1, 0, 0.5, 2])
    assert loss.betas({"labels": labels})[0].tolist() == pytest.approx([0, 0.5, 2, 0.1, 0, 0.1, 0.1])
