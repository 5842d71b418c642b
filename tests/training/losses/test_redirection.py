"""The loss `redirection`: golden numbers, independence of rows, and what it does in real trainings."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import Built, Project, adapter_weights, build, distance
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from sails_align.core.errors import InputError
from sails_align.training import run as align
from sails_align.training.losses.redirection import Redirection, nearest, redirection
from sails_align.training.losses.side_batches import SideBatches

QUICK = ("--init", "default", "--logging_steps", "1")
OURS = (*QUICK, "--loss", "redirection")
UNSAFE, SAFE = torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)


def test_golden_numbers():
    for h, expected in (((1.0, 1.0), math.log(2)), ((3.0, 1.0), 0.4261)):
        found = redirection(torch.tensor([h], dtype=torch.float64), UNSAFE, SAFE)
        assert found.item() == pytest.approx(expected, abs=5e-5)
    assert redirection(SAFE, -SAFE, SAFE).item() == pytest.approx(math.log1p(math.exp(-2)), abs=1e-12)


def info_nce(h_BD: Tensor, unsafe_BD: Tensor, safe_BD: Tensor) -> Tensor:
    cosines_BB = normalize(h_BD, dim=1) @ normalize(safe_BD, dim=1).T
    return cross_entropy(cosines_BB, torch.arange(len(h_BD)), reduction="none")


def test_a_rows_loss_does_not_depend_on_other_rows_and_that_of_info_nce_does():
    torch.manual_seed(0)
    h, unsafe, safe = (torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    changes = [
        (loss(h, unsafe, safe)[:2] - loss(h[:2], unsafe[:2], safe[:2])).abs().max() for loss in (redirection, info_nce)
    ]
    assert changes[0] < 1e-14
    assert changes[1] > 0.1, "control"


def test_its_gradient_turns_to_the_safe_target_and_away_from_the_unsafe_one():
    torch.manual_seed(0)
    h, unsafe, safe = (torch.randn(8, 5, dtype=torch.float64) for _ in range(3))
    leaf = h.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda each: redirection(each, unsafe, safe), leaf)
    (gradient,) = torch.autograd.grad(redirection(leaf, unsafe, safe).sum(), leaf)
    moved = h - 1e-3 * gradient

    def margin(x: Tensor) -> Tensor:
        return torch.cosine_similarity(x, safe) - torch.cosine_similarity(x, unsafe)

    assert (margin(moved) > margin(h)).all()


def test_the_nearest_target_is_that_of_brute_force():
    torch.manual_seed(0)
    unsafe, safe = torch.randn(7, 4), torch.randn(9, 4)
    expected = [max(range(9), key=lambda j: torch.cosine_similarity(row, safe[j], dim=0).item()) for row in unsafe]
    assert nearest(unsafe, safe).tolist() == expected
    assert nearest(unsafe, 5 * safe).tolist() == expected


class Trainer:
    """The parts of a trainer that number batches."""

    def __init__(self, step: int) -> None:
        self.state = type("State", (), {"global_step": step})
        self.args = type("Args", (), {"gradient_accumulation_steps": 2})


def test_side_batches_read_all_texts_in_turn_and_are_the_same_after_a_resume():
    whole, resumed = SideBatches(10, 3, seed=1), SideBatches(10, 3, seed=1)
    turns = [whole.turn(Trainer(step)) for step in (0, 0, 1, 1, 2, 2)]
    assert turns == [0, 1, 2, 3, 4, 5]
    assert [resumed.turn(Trainer(step)) for step in (1, 1, 2)] == [2, 3, 4]
    drawn = [i for turn in range(20) for i in whole.indices(turn)]
    assert all(sorted(drawn[start : start + 10]) == list(range(10)) for start in range(0, 60, 10))
    assert drawn[:10] != drawn[10:20]
    assert [i for turn in range(20) for i in SideBatches(10, 3, seed=2).indices(turn)] != drawn


def trained(project: Project, folder: Path, *options: str, method: Any = "sft") -> Built:
    argv = project.argv if method == "sft" else project.dpo_argv
    built = build(argv(folder, *options), method=method)
    built.trainer.train()
    return built


def test_with_weight_0_it_is_trls_training_bit_for_bit_and_with_another_it_is_not(project: Project, tmp_path: Path):
    plain = adapter_weights(trained(project, tmp_path, *QUICK, "--max_steps", "3").trainer)
    for weight, is_same in (("0", True), ("1", False)):
        ours = trained(project, tmp_path, *OURS, "--max_steps", "3", "--redirection_weight", weight)
        assert (distance(adapter_weights(ours.trainer), plain) == 0) == is_same


def loss_of(built: Built) -> Redirection:
    cells = [cell.cell_contents for cell in type(built.trainer).compute_loss.__closure__ or ()]
    (loss,) = (each for each in cells if isinstance(each, Redirection))
    return loss


def with_rows(project: Project, folder: Path, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> list[str]:
    """Return options of a training on the project's safety data, each row with some columns changed."""
    rows = [json.loads(line) for line in (project.folder / "safety.jsonl").read_text().splitlines()]
    path = folder / "changed.jsonl"
    path.write_text("".join(json.dumps({**row, **change(i, row)}) + "\n" for i, row in enumerate(rows)))
    return project.argv(folder, *OURS, "--dataset_name", str(path))


def raw_cosines(loss: Redirection) -> Tensor:
    """Return the cosine of each harmful answer and its target, with what all hidden states share."""
    return torch.cosine_similarity(loss._unsafe_ND + loss._shared_D, loss._safe_ND + loss._shared_D)


def test_chosen_responses_that_do_not_refuse_are_no_targets_however_near_they_are(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The chosen response of every second pair is a harmful answer, and so nearer than any refusal."""

    def poison(i: int, row: dict[str, Any]) -> dict[str, Any]:
        return {"chosen": f"you can with glue {i + 1}"} if i % 2 else {}

    argv = with_rows(project, tmp_path, poison)
    ours = loss_of(build(argv))
    monkeypatch.setattr("sails_align.training.losses.redirection.is_plain_refusal", lambda response: True)
    poisoned = loss_of(build(argv))
    near, nearer = (raw_cosines(loss) for loss in (ours, poisoned))
    assert (nearer > near.max() + 0.1).float().mean() > 0.3, "control: without the filter, many targets are harmful"


def test_what_all_hidden_states_share_does_not_count(project: Project, tmp_path: Path):
    """With it, harmful answers and refusals would be alike, and the loss nearly constant."""
    ours = loss_of(build(project.argv(tmp_path, *OURS)))
    cosines = torch.cosine_similarity(ours._unsafe_ND, ours._safe_ND)
    assert cosines.max() < 0 < raw_cosines(ours).min(), "control"
    middle = (ours._unsafe_ND.mean(0) + ours._safe_ND.mean(0)) / 2
    assert middle.norm() < 0.1 * ours._shared_D.norm()


def test_data_without_refusals_is_refused(project: Project, tmp_path: Path):
    with pytest.raises(InputError, match=r"(?s)is a refusal by the rules judge.*--loss redirection is empty;\ngive"):
        build(with_rows(project, tmp_path, lambda i, row: {"chosen": f"you can with glue {i + 1}"}))


def test_rows_of_harmless_requests_are_left_out(project: Project, tmp_path: Path):
    n_rows = len(loss_of(build(project.argv(tmp_path, *OURS)))._texts)
    half = loss_of(build(with_rows(project, tmp_path, lambda i, row: {"harmful": i % 2 == 0})))
    assert 0 < len(half._texts) < n_rows
    with pytest.raises(InputError, match=r"each row of the safety data has harmful: false;\ngive pairs"):
        build(with_rows(project, tmp_path, lambda i, row: {"harmful": False}))


def test_a_control_has_the_same_refusals_as_targets_in_another_order(project: Project, tmp_path: Path):
    def targets(*options: str) -> Tensor:
        return loss_of(build(project.argv(tmp_path, *OURS, *options)))._safe_ND

    ours, dealt = targets(), targets("--redirection_control_seed", "0")
    assert sorted(dealt.tolist()) == sorted(ours.tolist())
    assert not torch.equal(dealt, ours)
    assert torch.equal(dealt, targets("--redirection_control_seed", "0"))
    assert not torch.equal(dealt, targets("--redirection_control_seed", "1"))


def test_gradient_accumulation_does_not_change_its_part(project: Project, tmp_path: Path):
    """Of one batch of four or two of two; TRL's loss is a mean over tokens, so its part is the same, too."""
    losses = []
    for size, steps in (("4", "1"), ("2", "2")):
        options = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", steps, "--max_steps", "1")
        built = trained(project, tmp_path, *OURS, *options, "--redirection_weight", "5")
        losses.append(next(row["loss"] for row in built.trainer.state.log_history if "loss" in row))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize(
    ("method", "start"),
    [("sft", ("--init", "default")), ("dpo", ("--init", "default")), ("sft", ("--use_peft", "false"))],
)
def test_harmful_answers_move_to_refusals(project: Project, tmp_path: Path, method: Any, start: tuple[str, ...]):
    options = ("--loss", "redirection", "--redirection_weight", "30", "--max_steps", "12", "--logging_steps", "1")
    more = ("--gradient_checkpointing", "true") if start[0] == "--init" and method == "sft" else ()
    built = trained(project, tmp_path, *start, *options, *more, method=method)
    found = [row["redirection"] for row in built.trainer.state.log_history if "redirection" in row]
    assert len(found) == 12
    assert found[0] > math.log(2), "at first, the model is at the unsafe target"
    assert found[-1] < found[0] - 0.05


def test_a_resumed_training_has_the_same_targets_and_texts(project: Project, tmp_path: Path):
    argv = project.argv(tmp_path / "run", *OURS, "--max_steps", "4", "--save_total_limit", "9")
    align.main("sft", argv)
    whole = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert "redirection_weight" in (tmp_path / "run" / "README.md").read_text(), "the model card"
    resumed = build(argv)
    resumed.trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert distance(adapter_weights(resumed.trainer), whole) < 1e-6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--redirection_weight", "-1"), "redirection_weight is -1.0; choose 0 or more"),
        (("--redirection_layer", "-1"), "redirection_layer is -1; choose 0 or more"),
        (("--redirection_layer", "3"), "layer 3 is out of range; choose 0 to 2"),
        (("--torch_compile", "true"), "torch_compile is true"),
        (("--max_length", "6"), "choose a larger --max_length"),
    ],
)
def test_what_it_cannot_be_used_with(project: Project, tmp_path: Path, options: tuple[str, ...], said: str):
    with pytest.raises(InputError) as refused:
        build(project.argv(tmp_path, *OURS, *options))
    assert said in str(refused.value)


def test_it_needs_harmful_answers(project: Project, tmp_path: Path):
    helpful = str(project.folder / "helpful.jsonl")
    with pytest.raises(InputError, match="the data has no rejected responses"):
        build(project.argv(tmp_path, *OURS, "--dataset_name", helpful))
