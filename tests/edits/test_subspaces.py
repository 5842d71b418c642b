"""The subspace of a layer's outputs keeps a share of the entropy of its singular values."""

import pytest
import torch
from tiny import N_LAYERS
from torch import Tensor

from sails_align.edits.linears import dense_model, linears_of
from sails_align.edits.low_rank import truncated
from sails_align.edits.subspaces import (
    GatheredOutputs,
    OutputSubspace,
    entropy_rank,
    find_subspaces,
    weights_of,
)
from sails_align.edits.weights import open_weights
from sails_align.models.inputs import watched_inputs


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subspace_of(outputs_OT: Tensor, eta: float, a_1: float = 1.0) -> OutputSubspace:
    """Of outputs that are added in two parts."""
    outputs = GatheredOutputs(*outputs_OT.shape)
    for part_OT in outputs_OT.split(20, dim=1):
        outputs.add(part_OT.T)
    found = outputs.subspace(eta, a_1)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("values", "eta", "rank"),
    [
        ((2, 1, 1), 0.3, 1),
        ((2, 1, 1), 0.32, 2),
        ((2, 1, 1), 0.6, 2),
        ((2, 1, 1), 0.66, 3),
        ((2, 1, 1), 0.8, 3),
        ((2, 1, 1), 1.0, 3),
        ((10, 1), 0.17, 1),
        ((10, 1), 0.18, 2),  # though the first holds 99% of the energy
        ((3,), 0.5, 1),
        ((3, 0), 0.9, 1),
    ],
)
def test_worked_examples_of_the_rank(values: tuple[int, ...], eta: float, rank: int) -> None:
    assert entropy_rank(torch.tensor(values, dtype=torch.float64), eta) == rank


def test_weights_fall_from_a_1_to_1() -> None:
    found = weights_of(torch.tensor([5.0, 3.0, 1.0]), 2.0)
    torch.testing.assert_close(found, torch.tensor([2.0, 1.5, 1.0]))
    assert torch.equal(weights_of(torch.tensor([2.0, 2.0]), 3.0), torch.ones(2))
    assert torch.equal(weights_of(torch.tensor([2.0]), 3.0), torch.ones(1))


def test_a_plain_projector() -> None:
    outputs_OT = random(8, 50)
    subspace = subspace_of(outputs_OT, 0.7)
    projector_OO = subspace.project(torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(projector_OO, projector_OO.T, atol=1e-10, rtol=0)
    torch.testing.assert_close(projector_OO @ projector_OO, projector_OO, atol=1e-10, rtol=0)
    assert 1 < subspace.rank < 8
    assert projector_OO.trace().item() == pytest.approx(subspace.rank)
    left_OK = torch.linalg.svd(outputs_OT, full_matrices=False)[0][:, : subspace.rank]
    torch.testing.assert_close(projector_OO, left_OK @ left_OK.T, atol=1e-10, rtol=0)
    weighted_OO = subspace_of(outputs_OT, 0.7, 2.0).project(torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(left_OK[:, 0] @ weighted_OO @ left_OK[:, 0], torch.tensor(4.0, dtype=torch.float64))
    torch.testing.assert_close(weighted_OO, weighted_OO.T, atol=1e-10, rtol=0)
    assert (weighted_OO @ weighted_OO - weighted_OO).abs().max() > 0.1


def test_the_subspace_holds_the_outputs_and_a_random_one_of_its_rank_does_not() -> None:
    outputs_OT = random(64, 4, seed=1) @ random(4, 200, seed=2) + 0.1 * random(64, 200, seed=3)
    subspace = subspace_of(outputs_OT, 0.7)
    control = OutputSubspace(torch.linalg.qr(random(64, subspace.rank, seed=4))[0], subspace.weights)
    kept, by_chance = (
        (each.project(outputs_OT).square().sum() / outputs_OT.square().sum()).item() for each in (subspace, control)
    )
    assert kept > 0.7
    assert by_chance < 0.3


def test_all_directions_are_no_projector_at_all() -> None:
    outputs_OT, delta_OI = random(6, 40), random(6, 4, seed=1)
    subspace = subspace_of(outputs_OT, 1.0)
    torch.testing.assert_close(subspace.project(delta_OI), delta_OI, atol=1e-10, rtol=0)
    few = subspace_of(outputs_OT[:, :3], 1.0)
    assert few.rank == 3, "no more directions than tokens"


@pytest.mark.parametrize("eta", [0.5, 0.9, 1.0])
def test_few_tokens_and_many_give_one_subspace(eta: float) -> None:
    outputs_OT = random(30, 20) * torch.logspace(0, -5, 20, dtype=torch.float64)
    few, zeros_OT = subspace_of(outputs_OT, eta), torch.zeros(30, 11, dtype=torch.float64)
    many = subspace_of(torch.cat([outputs_OT, zeros_OT], dim=1), eta)  # the same, summed up as Z Z^T
    assert few.rank == many.rank
    torch.testing.assert_close(few.directions.T @ few.directions, torch.eye(few.rank).double(), atol=1e-10, rtol=0)
    delta_OI = random(30, 4, seed=1)
    torch.testing.assert_close(few.project(delta_OI), many.project(delta_OI), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_subspace_of_the_difference_itself_gives_the_term_of_lox(rank: int) -> None:
    delta_OI = random(6, 9)
    left_OK = torch.linalg.svd(delta_OI, full_matrices=False)[0]
    own = OutputSubspace(left_OK[:, :rank], torch.ones(rank, dtype=torch.float64))
    torch.testing.assert_close(own.project(delta_OI), truncated(delta_OI, rank)[0], atol=1e-10, rtol=0)
    # That of activations gives another one: an LSSF that takes none is none.
    outputs_OT = random(6, 40, seed=2)
    other = subspace_of(outputs_OT, 0.5)
    assert (other.project(delta_OI) - truncated(delta_OI, other.rank)[0]).abs().max() > 0.1


def test_the_outputs_are_those_for_inputs_of_unit_norm(family) -> None:
    weights = open_weights(family.adapter)
    places = {name: place for name, place in linears_of(weights).items() if place.block == 1}
    ids_BS = torch.randint(4, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    model = dense_model(weights, "cpu", torch.float64)
    found = dict(find_subspaces(model, places, [(ids_BS, torch.ones_like(ids_BS), mask_BS)], 0.8, 1.0))
    assert found.keys() == places.keys()
    # Inputs of o_proj come from no norm, so that they differ in length.
    module, inputs = "model.layers.1.self_attn.o_proj", []
    with watched_inputs(model, [module], lambda _, inputs_BSI: inputs.append(inputs_BSI[mask_BS])), torch.no_grad():
        model(input_ids=ids_BS)
    lengths_T1 = inputs[0].norm(dim=1, keepdim=True)
    assert lengths_T1.max() > 1.5 * lengths_T1.min()
    outputs_OT = weights.get(f"{module}.weight").double() @ (inputs[0] / lengths_T1).T
    left_OK, values_K, _ = torch.linalg.svd(outputs_OT, full_matrices=False)
    rank = entropy_rank(values_K, 0.8)
    assert found[f"{module}.weight"].rank == rank
    expected_OO = left_OK[:, :rank] @ left_OK[:, :rank].T
    torch.testing.assert_close(
        found[f"{module}.weight"].project(torch.eye(len(left_OK))), expected_OO, atol=1e-4, rtol=0
    )
    assert N_LAYERS > 2  # the last block is not run
