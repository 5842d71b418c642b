"""The loss `crisp`: which features it chooses, what it is at the start, and that it suppresses them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import Built, Project, adapter_weights, build, distance, half_harmless

from sails_align.core.errors import InputError
from sails_align.subspace.statistics import SideSums, TokenStats
from sails_align.training import run as align
from sails_align.training.losses.crisp import CRISP, activations, random_features, salient_features

OURS = ("--init", "default", "--logging_steps", "1", "--loss", "crisp", "--warmup_steps", "0", "--crisp_ratio", "1")


def side(means: list[float], rates: list[float]) -> SideSums:
    sums, active = torch.tensor(means, dtype=torch.float64), torch.tensor(rates, dtype=torch.float64)
    return SideSums(torch.tensor(1), sums, sumsq=sums.square(), active=active)


def test_features_are_chosen_by_how_often_and_how_much_more_they_are_active():
    #                 more often   much more often   often, not much more   less often   dead
    harmful = side([4.0, 3.0, 5.0, 9.0, 0.0], [0.5, 0.9, 0.95, 0.1, 0.0])
    harmless = side([1.0, 1.0, 4.0, 1.0, 0.0], [0.2, 0.1, 0.05, 0.2, 0.0])
    stats = TokenStats({("prompt", 0, "unaligned"): harmful, ("prompt", 0, "aligned"): harmless})
    assert salient_features(stats, 0, 9, 3.0) == [1, 0]
    assert salient_features(stats, 0, 1, 3.0) == [1]
    swapped = TokenStats({("prompt", 0, "unaligned"): harmless, ("prompt", 0, "aligned"): harmful})
    assert salient_features(swapped, 0, 9, 3.0) == [], "control"
    drawn = [random_features(stats, 0, 2, seed) for seed in range(50)]
    assert {feature for features in drawn for feature in features} == {0, 1, 2, 3}, "of a control: all but the dead one"
    assert random_features(stats, 0, 2, 7) == drawn[7]


def loss_of(built: Built) -> CRISP:
    cells = [cell.cell_contents for cell in type(built.trainer).compute_loss.__closure__ or ()]
    (loss,) = (each for each in cells if isinstance(each, CRISP))
    return loss


def trained(project: Project, folder: Path, *options: str) -> Built:
    built = build(project.argv(folder, *OURS, *options))
    built.trainer.train()
    return built


def logged(built: Built, name: str) -> list[float]:
    return [row[name] for row in built.trainer.state.log_history if name in row]


WHOLE = ("--per_device_train_batch_size", "36")
"""All harmful answers in each batch: 40 but for those that are held out."""


def test_features_fall_silent_in_harmful_answers_and_harmless_ones_stay(project: Project, tmp_path: Path):
    free, kept = (
        trained(project, tmp_path, *WHOLE, "--max_steps", "20", "--crisp_retain_weight", weight)
        for weight in ("0", "10")
    )
    active = logged(free, "crisp_active")
    assert active[-1] < 0.8 * active[0]
    assert logged(kept, "crisp_retain")[0] == pytest.approx(0, abs=1e-10)
    assert logged(free, "crisp_retain")[-1] > 2 * logged(kept, "crisp_retain")[-1], "control"


def test_at_the_start_it_is_1_over_all_harmful_answers(project: Project, tmp_path: Path):
    assert logged(trained(project, tmp_path, *WHOLE, "--max_steps", "1"), "crisp_active")[0] == pytest.approx(
        1, rel=1e-4
    )


def test_a_control_has_as_many_features_and_other_ones(project: Project, tmp_path: Path):
    ours = loss_of(build(project.argv(tmp_path / "ours", *OURS))).features
    drawn = loss_of(build(project.argv(tmp_path / "drawn", *OURS, "--crisp_control_seed", "0"))).features
    assert {layer: len(ids) for layer, ids in drawn.items()} == {layer: len(ids) for layer, ids in ours.items()}
    assert drawn != ours


def test_activations_have_gradients_where_a_feature_is_active_and_nowhere_else(project: Project, tmp_path: Path):
    loss = loss_of(build(project.argv(tmp_path, *OURS)))
    layer, ids = next(iter(loss.features.items()))
    hidden_TD = torch.randn(20, 32, requires_grad=True)
    acts_TK = activations(loss.saes[layer], hidden_TD, ids)
    assert torch.equal(acts_TK.detach(), loss.saes[layer].encode(hidden_TD)[:, ids])
    (gradient_TD,) = torch.autograd.grad(acts_TK.sum(), hidden_TD)
    is_active_T = (acts_TK > 0).any(1)
    assert (gradient_TD.abs().sum(1) > 0).equal(is_active_T)
    assert all(not parameter.requires_grad for parameter in loss.saes[layer].sae.parameters())


def test_a_resumed_training_is_the_same(project: Project, tmp_path: Path):
    argv = project.argv(tmp_path / "run", *OURS, "--max_steps", "4", "--save_total_limit", "9")
    align.main("sft", argv)
    whole = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert "crisp_features" in (tmp_path / "run" / "README.md").read_text(), "the model card"
    resumed = build(argv)
    resumed.trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert distance(adapter_weights(resumed.trainer), whole) < 1e-6


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("dpo", ("--init", "default"), "loss is crisp, which is for SFT only"),
        ("sft", ("--use_peft", "false"), "but training starts from full"),
        ("sft", ("--init", "pissa"), "but training starts from pissa"),
        ("sft", ("--torch_compile", "true"), "torch_compile is true"),
        ("sft", ("--crisp_features", "0"), "crisp_features is 0; choose 1 or more"),
        ("sft", ("--crisp_ratio", "0.5"), "crisp_ratio is 0.5; choose 1 or more"),
        ("sft", ("--crisp_retain_weight", "-1"), "crisp_retain_weight is -1.0"),
    ],
)
def test_what_it_cannot_be_used_with(
    project: Project, tmp_path: Path, method: Any, options: tuple[str, ...], said: str
):
    with pytest.raises(InputError) as refused:
        align.parse(method, project.argv(tmp_path, "--loss", "crisp", *options))
    assert said in str(refused.value)


def test_data_without_a_difference_is_refused(project: Project, tmp_path: Path):
    """Its harmful and its harmless answers are the same words."""
    with pytest.raises(InputError, match="no SAE feature is 3 times more active in harmful answers than in harmless"):
        build(project.argv(tmp_path, *OURS, "--crisp_ratio", "3"))


def test_answers_to_requests_that_are_said_to_be_harmless_are_not_unlearned(project: Project, tmp_path: Path):
    path = half_harmless(project, tmp_path)
    built = build(project.argv(tmp_path, *OURS, "--dataset_name", str(path)))
    n_harmful = sum(built.source.safety["harmful"][:])
    assert len(loss_of(built)._forget) == n_harmful < len(built.source.safety)
