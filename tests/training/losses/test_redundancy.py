"""The loss `redundancy`: identities of the penalty, its gradient, its place in real trainings, and resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import Built, Project, adapter_weights, build, distance
from torch import Tensor

from sails_align.core.errors import InputError
from sails_align.models.inputs import watched_inputs
from sails_align.training import run as align
from sails_align.training.losses.redundancy import redundancy

QUICK = ("--init", "default", "--logging_steps", "1")
OURS = (*QUICK, "--loss", "redundancy")
SEEDS = st.integers(0, 2**31)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(n, n, seed=seed)).Q


def of_features(z_TR: Tensor, n_groups: int) -> float:
    return redundancy(z_TR.T @ z_TR, n_groups).item()


def test_it_is_0_for_orthonormal_rows_and_white_inputs_and_not_where_inputs_are_not_white():
    rows_RI = orthogonal(6, 0)[:4]
    white_TI = torch.linalg.qr(random(50, 6, seed=1)).Q
    assert of_features(white_TI @ rows_RI.T, 2) == pytest.approx(0, abs=1e-28)
    assert redundancy(rows_RI @ rows_RI.T, 4).item() == pytest.approx(0, abs=1e-28)
    coloured_TI = white_TI @ torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    assert of_features(coloured_TI @ rows_RI.T, 2) > 0.01, "control: orthogonal rows, and yet redundant features"


@given(SEEDS)
@settings(deadline=None, max_examples=25)
def test_a_group_with_itself_gives_1_and_with_another_less(seed: int):
    z_TG = random(30, 3, seed=seed)
    assert of_features(torch.cat([z_TG, z_TG], dim=1), 2) == pytest.approx(1, abs=1e-12)
    other_TG = random(30, 3, seed=seed + 1)
    assert 0 <= of_features(torch.cat([z_TG, other_TG], dim=1), 2) < 0.9


@given(SEEDS, st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=25)
def test_rotations_inside_a_group_and_scales_do_not_matter_but_across_groups_they_do(seed: int, scale: float):
    z_TR = random(30, 6, seed=seed)
    value = of_features(z_TR, 2)
    rotated = torch.cat([scale * z_TR[:, :3] @ orthogonal(3, seed), z_TR[:, 3:] @ orthogonal(3, seed + 1)], dim=1)
    assert of_features(rotated, 2) == pytest.approx(value, rel=1e-10, abs=1e-14)
    assert of_features(z_TR @ orthogonal(6, seed), 2) != pytest.approx(value, rel=1e-4), "control"


def test_it_is_the_definition_for_any_number_of_groups():
    z_TR = random(20, 5, seed=3)
    for n_groups in (2, 3, 5):
        parts = z_TR.tensor_split(n_groups, dim=1)
        pairs = [(g, h) for i, g in enumerate(parts) for h in parts[i + 1 :]]
        expected = sum(((g.T @ h).norm() ** 2 / (g.T @ g).norm() / (h.T @ h).norm()).item() for g, h in pairs) / len(
            pairs
        )
        assert of_features(z_TR, n_groups) == pytest.approx(expected, rel=1e-12)


def test_its_gradient_is_that_of_finite_differences():
    x_TI, A_RI = random(12, 5, seed=0), random(4, 5, seed=1).requires_grad_()

    def penalty(rows_RI: Tensor) -> Tensor:
        z_TR = (x_TI - x_TI.mean(0)) @ rows_RI.T
        return redundancy(z_TR.T @ z_TR, 2)

    assert torch.autograd.gradcheck(penalty, A_RI)
    zero = torch.zeros(3, 3, requires_grad=True)
    assert torch.autograd.grad(redundancy(zero, 3), zero)[0].abs().max() == 0, "no NaN where nothing is"


def trained(project: Project, folder: Path, *options: str) -> Built:
    built = build(project.argv(folder, "--max_steps", "3", *options))
    built.trainer.train()
    return built


@pytest.mark.parametrize("form", ["features", "weights"])
def test_with_weight_0_it_is_trls_training_bit_for_bit_and_with_another_it_is_not(
    project: Project, tmp_path: Path, form: str
):
    plain = adapter_weights(trained(project, tmp_path, *QUICK).trainer)
    for weight, is_same in (("0", True), ("0.5", False)):
        options = (*OURS, "--redundancy_form", form, "--redundancy_weight", weight)
        ours = adapter_weights(trained(project, tmp_path, *options).trainer)
        assert (distance(ours, plain) == 0) == is_same


def batch_of(trainer: Any) -> dict[str, Tensor]:
    return {name: value.to(trainer.model.device) for name, value in next(iter(trainer.get_train_dataloader())).items()}


def penalty_by_hand(trainer: Any, batch: dict[str, Tensor], n_groups: int) -> float:
    names = [name for name, _ in trainer.model.named_modules() if name.endswith("lora_A.default")]
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), watched_inputs(trainer.model, names, lambda name, x: seen.update({name: x})):
        trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    values = []
    for name in names:
        x_TI = seen[name][batch["attention_mask"].bool()].double()
        z_TR = (x_TI - x_TI.mean(0)) @ trainer.model.get_submodule(name).weight.detach().double().T
        values.append(of_features(z_TR, n_groups))
    return sum(values) / len(values)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_at_the_first_step_it_adds_its_share_of_trls_loss(project: Project, tmp_path: Path, method: Any):
    argv = project.argv if method == "sft" else project.dpo_argv
    more = ("--loss", "redundancy", "--redundancy_weight", "0.25", "--lora_dropout", "0")
    plain: Any = build(argv(tmp_path, *QUICK, "--lora_dropout", "0"), method=method).trainer
    ours: Any = build(argv(tmp_path, *QUICK, *more), method=method).trainer
    batch = batch_of(ours)
    losses = [trainer.compute_loss(trainer.model.train(), dict(batch)) for trainer in (plain, ours)]
    assert losses[1].item() == pytest.approx(1.25 * losses[0].item(), rel=1e-5)
    logged = ours._metrics["train"]["redundancy"][-1]
    assert logged == pytest.approx(penalty_by_hand(ours, batch, 2), rel=1e-4)
    losses[1].backward()
    assert all(p.grad is not None for name, p in ours.model.named_parameters() if "lora_A" in name)


def test_it_makes_features_less_redundant_than_plain_training_does(project: Project, tmp_path: Path):
    found = []
    for weight in ("0", "1"):
        options = (*OURS, "--redundancy_weight", weight, "--max_steps", "12", "--lora_dropout", "0")
        trainer: Any = trained(project, tmp_path, *options).trainer
        found.append(penalty_by_hand(trainer, batch_of(trainer), 2))
    assert found[1] < 0.7 * found[0]


def test_a_resumed_training_has_the_same_running_means(project: Project, tmp_path: Path):
    argv = project.argv(
        tmp_path / "run", *OURS, "--redundancy_weight", "1", "--max_steps", "4", "--save_total_limit", "9"
    )
    align.main("sft", argv)
    whole = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert "redundancy_weight" in (tmp_path / "run" / "README.md").read_text(), "the model card"
    resumed = build(argv)
    resumed.trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert distance(adapter_weights(resumed.trainer), whole) < 1e-6
    forgetful = build(argv)
    path = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert min(state["stateful_callbacks"]["RunningMeans"]["attributes"]["means"]) > 0
    state["stateful_callbacks"]["RunningMeans"]["attributes"]["means"] = None
    path.write_text(json.dumps(state))
    forgetful.trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert distance(adapter_weights(forgetful.trainer), whole) > 1e-5, "control: the means matter"


def test_factors_that_start_at_zero_are_left_alone(project: Project, tmp_path: Path):
    argv = project.argv(
        tmp_path, *OURS, "--redundancy_form", "weights", "--redundancy_weight", "100", "--max_steps", "1"
    )
    built = build(argv)
    assert {path.split(".")[-2] for path in _loss_of(built)._factors} == {"lora_A"}


def _loss_of(built: Built) -> Any:
    cells = [cell.cell_contents for cell in type(built.trainer).compute_loss.__closure__ or ()]
    (loss,) = (each for each in cells if hasattr(each, "_factors"))
    return loss


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--redundancy_groups", "5"), "redundancy_groups is 5, but lora_r is 4; choose at most that"),
        (("--redundancy_groups", "1"), "redundancy_groups is 1; choose 2 or more"),
        (("--redundancy_weight", "nan"), "redundancy_weight is nan"),
        (("--redundancy_form", "feature"), "redundancy_form is 'feature'"),
        (("--torch_compile", "true"), "torch_compile is true"),
    ],
)
def test_what_it_cannot_be_used_with(project: Project, tmp_path: Path, options: tuple[str, ...], said: str):
    with pytest.raises(InputError) as refused:
        align.parse("sft", project.argv(tmp_path, *OURS, *options))
    assert said in str(refused.value)


def test_it_needs_an_adapter_with_a_factor_to_work_on(project: Project, tmp_path: Path):
    with pytest.raises(InputError, match="use_peft is false"):
        align.parse("sft", project.argv(tmp_path, "--loss", "redundancy", "--use_peft", "false"))
    frozen = ("--loss", "redundancy", "--init", "sails", "--subspace_mode", "freeze")
    with pytest.raises(InputError, match="no lora_A is both trained and different from zero"):
        build(project.argv(tmp_path, *frozen))
