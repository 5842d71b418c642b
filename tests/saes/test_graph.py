"""The graph penalty: golden numbers, the energy identity, and trainings with it on a tiny model."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from sails_align.cli import train_sae
from sails_align.core.errors import InputError
from sails_align.saes.graph import GraphPenalty, adjacency, energies, graph_penalty, laplacian, permuted
from sails_align.saes.layer_trainer import LayerTrainer
from sails_align.saes.options import SAETrainingOptions

if TYPE_CHECKING:
    from tiny import Project

STATES_ND = torch.tensor([[1.0, 2, 0, -1], [2, 4, 1, 0], [0, 1, 3, 2], [1, 1, 2, 1]])


def random_graph(d_model: int = 12, threshold: float = 0.3) -> torch.Tensor:
    states_ND = torch.randn(20, d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states_ND[:, 0] = 0  # without a neighbour
    return adjacency(states_ND, threshold)


# The graph


def test_golden_numbers_of_the_official_function() -> None:
    weights_DD = adjacency(STATES_ND, 0.6)
    expected_DD = torch.zeros(4, 4, dtype=torch.float64)
    expected_DD[0, 1] = expected_DD[1, 0] = 0.957427
    expected_DD[2, 3] = expected_DD[3, 2] = 0.872871
    torch.testing.assert_close(weights_DD, expected_DD, atol=1e-6, rtol=0)
    laplacian_DD = laplacian(weights_DD)
    pair = [[1.0, -1.0], [-1.0, 1.0]]
    expected_DD = torch.block_diag(torch.tensor(pair), torch.tensor(pair)).double()
    torch.testing.assert_close(laplacian_DD, expected_DD)
    decoder_DF = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, -1]], dtype=torch.float64)
    assert energies(decoder_DF.T, laplacian_DD).tolist() == pytest.approx([2.0, 5.0])


def test_energy_is_the_disagreement_of_neighbours() -> None:
    weights_DD = random_graph()
    degree_D = weights_DD.sum(1)
    isolated_D = degree_D == 0
    assert isolated_D.any()
    assert not isolated_D.all()
    directions_FD = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scaled_FD = directions_FD / torch.where(isolated_D, 1.0, degree_D).sqrt()
    differences_FDD = scaled_FD[:, :, None] - scaled_FD[:, None]
    expected_F = (weights_DD * differences_FDD.square()).sum((1, 2)) / 2
    expected_F += directions_FD[:, isolated_D].square().sum(1)
    found_F = energies(directions_FD, laplacian(weights_DD))
    torch.testing.assert_close(found_F, expected_F, atol=1e-10, rtol=0)
    assert (found_F - directions_FD.square().sum(1)).abs().min() > 1e-3  # control: without a graph it is the norm


def test_the_laplacian_is_positive_semidefinite_and_smooth_directions_have_energy_0() -> None:
    weights_DD = torch.block_diag(torch.ones(3, 3), 0.7 * torch.ones(4, 4)).double().fill_diagonal_(0)
    laplacian_DD = laplacian(weights_DD)
    values_D = torch.linalg.eigvalsh(laplacian_DD)
    assert values_D.min() > -1e-12
    assert values_D.max() < 2 + 1e-12
    assert (torch.linalg.eigvalsh(laplacian(random_graph())) > -1e-12).all()
    smooth_FD = weights_DD.sum(1).sqrt() * torch.tensor([[1.0] * 3 + [0.0] * 4, [0.0] * 3 + [1.0] * 4])
    assert energies(smooth_FD, laplacian_DD).abs().max() < 1e-12
    # Controls: a direction that is not smooth, and the same one on the graph with its coordinates permuted.
    assert energies(smooth_FD * torch.tensor([1, -1, 1, 1, -1, 1, 1]), laplacian_DD).min() > 0.1
    control_DD = permuted(laplacian_DD, seed=1)
    assert energies(smooth_FD, control_DD).min() > 0.1
    torch.testing.assert_close(torch.linalg.eigvalsh(control_DD), values_D)
    assert torch.equal(permuted(laplacian_DD, seed=1), control_DD)
    assert not torch.equal(permuted(laplacian_DD, seed=2), control_DD)


# The penalty


def penalty_of(weight: float, d_model: int = 12) -> GraphPenalty:
    weights_DD = random_graph(d_model)
    return GraphPenalty(laplacian(weights_DD), int((weights_DD > 0).sum()) // 2, 1, weight)


def test_the_gradient_is_that_of_the_loss_with_the_penalty() -> None:
    decoder_FD = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    penalty = penalty_of(0.3)
    with_hook, by_hand = (decoder_FD.clone().requires_grad_() for _ in range(2))
    penalty.add_to(with_hook)
    with_hook.square().mul(0.1).sum().backward()
    unit_FD = by_hand / by_hand.norm(dim=1, keepdim=True)
    (by_hand.square().mul(0.1).sum() + 0.3 * 12 * energies(unit_FD, penalty.laplacian).mean()).backward()
    assert with_hook.grad is not None
    torch.testing.assert_close(with_hook.grad, by_hand.grad, atol=1e-10, rtol=0)
    of_penalty_FD = with_hook.grad - 0.2 * decoder_FD
    assert of_penalty_FD.norm() > 0.1
    assert ((of_penalty_FD * decoder_FD).sum(1).abs() < 1e-10).all()  # shrinking a direction does not pay


def trained(architecture: str, penalty: GraphPenalty | None) -> LayerTrainer:
    hidden_TD = torch.randn(1000, 12, generator=torch.Generator().manual_seed(2))
    options = SAETrainingOptions(architecture=architecture, d_sae=24, k=2, n_tokens=8000, batch_size=100)
    trainer = LayerTrainer(12, options.for_width(12), "cpu", {"model_name": "tiny"}, penalty)
    while not trainer.done:
        trainer.train(hidden_TD)
    return trainer


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gba"])
def test_it_lowers_the_energy_and_weight_0_is_the_ordinary_training(architecture: str) -> None:
    plain, zero, some = (trained(architecture, penalty) for penalty in (None, penalty_of(0.0), penalty_of(3.0)))
    for name, tensor in plain.trainer.sae.state_dict().items():
        assert torch.equal(tensor, zero.trainer.sae.state_dict()[name]), name
    before, after = (penalty_of(1.0).mean_energy(trainer.trainer.sae.W_dec) for trainer in (plain, some))
    assert after < 0.7 * before
    control = GraphPenalty(permuted(penalty_of(1.0).laplacian, seed=1), 1, 1, 1.0)
    assert control.mean_energy(some.trainer.sae.W_dec) > after


# Whole trainings of a tiny model


def argv(project: "Project", output: Path, *more: str) -> list[str]:
    data = str(project.folder / "safety.jsonl")
    options: dict[str, Any] = {
        **{"model_name_or_path": project.folder / "tiny", "dataset_name": data, "layers": 1, "d_sae": 48, "k": 8},
        **{"n_tokens": 2000, "batch_size": 100, "eval_tokens": 100, "buffer_tokens": 500, "output_dir": output},
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + list(more)


def with_graph(project: "Project", *more: str) -> list[str]:
    data = str(project.folder / "helpful.jsonl")
    return ["--graph_lambda", "1", "--graph_threshold", "0.3", "--graph_dataset_name", data, *more]


def test_what_was_used_is_in_the_report_the_metadata_and_the_card(tmp_path: Path, project: "Project") -> None:
    plain = train_sae.main(argv(project, tmp_path / "plain"))[1]
    zero = train_sae.main(argv(project, tmp_path / "zero", "--graph_lambda", "0"))[1]
    report = train_sae.main(argv(project, tmp_path / "graph", *with_graph(project)))[1]
    control = train_sae.main(argv(project, tmp_path / "control", *with_graph(project, "--graph_control_seed", "3")))[1]
    assert plain.input_hash == zero.input_hash
    assert plain.sha256 == zero.sha256
    assert plain.graph_energy is plain.graph_edges is None
    assert len({plain.input_hash, report.input_hash, control.input_hash}) == 3
    assert report.graph_edges == control.graph_edges
    assert report.graph_edges
    assert report.graph_energy is not None
    assert 0 <= report.graph_energy < 1
    folder = tmp_path / "control" / "layer_1"
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]["graph"]
    assert metadata["control_seed"] == 3
    assert (metadata["lambda"], metadata["threshold"], metadata["n_prompts"]) == (1.0, 0.3, 60)
    card = (folder / "README.md").read_text()
    assert f"graph penalty (arXiv 2512.06655) of weight 1. The graph has {report.graph_edges:,} edges" in card
    assert "permuted at random (seed 3)" in card
    assert "graph" not in (tmp_path / "plain" / "layer_1" / "README.md").read_text()
    weights = [load_file(tmp_path / name / "layer_1" / "sae_weights.safetensors") for name in ("plain", "graph")]
    assert not torch.equal(weights[0]["W_dec"], weights[1]["W_dec"])
    for of in weights:
        torch.testing.assert_close(of["W_dec"].norm(dim=1), torch.ones(48))


def test_other_prompts_are_another_training(tmp_path: Path, project: "Project") -> None:
    words = argv(project, tmp_path, *with_graph(project))
    train_sae.main(words)
    with pytest.raises(InputError, match=r"\(different: metadata\)"):
        train_sae.main([*words, "--graph_dataset_name", str(project.folder / "safety.jsonl")])


def test_a_graph_that_leaves_most_coordinates_alone_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    states_ND = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    states_ND[:, 1] = states_ND[:, 0]
    options = SAETrainingOptions(graph_lambda=1.0, graph_threshold=0.9)
    with caplog.at_level(logging.WARNING):
        penalty = graph_penalty(2, states_ND, options)
    assert (penalty.n_edges, penalty.n_isolated) == (1, 6)
    assert "layer 2: 6 of 8 coordinates have no neighbour in the graph" in caplog.text
    caplog.clear()
    graph_penalty(2, states_ND[:, :2], options)
    assert not caplog.records


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--graph_threshold", "0.3"], "graph_threshold is 0.3, but it is used only with a graph_lambda above 0"),
        (["--graph_control_seed", "1"], "graph_control_seed is 1, but it is used only with a graph_lambda above 0"),
        (["--graph_dataset_name", "x.jsonl"], "graph_dataset_name is given, but graph_lambda is 0"),
        (["--graph_lambda", "-1"], "graph_lambda is -1.0"),
        (["--graph_lambda", "1", "--graph_threshold", "0"], "graph_threshold is 0.0"),
        (["--graph_lambda", "1"], "no prompts come with .*tiny; give a dataset with --graph_dataset_name"),
        (["--graph_lambda", "1", "--graph_dataset_name", "none.jsonl"], "there is no file or folder none.jsonl"),
    ],
)
def test_combinations_that_cannot_be_used(tmp_path: Path, project: "Project", more: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        train_sae.main(argv(project, tmp_path / "out", *more))
    assert not (tmp_path / "out" / "layer_1").exists()


def test_a_graph_without_an_edge_is_refused(tmp_path: Path, project: "Project") -> None:
    with pytest.raises(InputError, match=r"no two coordinates of layer 1 have a correlation of 1.1 or more"):
        train_sae.main(argv(project, tmp_path, *with_graph(project, "--graph_threshold", "1.1")))


def test_the_testbeds_prompts_come_with_it() -> None:
    prompts = train_sae.graph_prompts_of(train_sae.SAEArguments(layers=[1]))
    assert len(prompts) == 2 * train_sae.N_GRAPH_PROMPTS
    assert prompts == train_sae.graph_prompts_of(train_sae.SAEArguments(layers=[1], graph_dataset_name="testbed"))
