"""Bases are orthonormal to rounding, whatever they are made from; angles and energies agree with constructed cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sails_align.core.linalg import complete_basis, orthonormalize, principal_angles

sizes = st.integers(2, 40).flatmap(lambda d: st.tuples(st.just(d), st.integers(0, d), st.integers(0, d)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_basis(d_model: int, rank: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d_model, rank, generator=generator(seed)))[0]


def off_orthonormal(basis_DR: torch.Tensor) -> float:
    if basis_DR.shape[1] == 0:
        return 0.0
    return (basis_DR.double().T @ basis_DR.double() - torch.eye(basis_DR.shape[1])).abs().max().item()


@settings(deadline=None, max_examples=50)
@given(sizes, st.integers(0, 1000))
def test_orthonormalize_keeps_span_order_and_sign(size, seed):
    d_model, rank, _ = size
    directions_DK = torch.randn(d_model, rank, generator=generator(seed), dtype=torch.float64)
    basis_DR = orthonormalize(directions_DK)
    assert off_orthonormal(basis_DR) < 1e-12
    coordinates_RK = basis_DR.T @ directions_DK
    torch.testing.assert_close(basis_DR @ coordinates_RK, directions_DK)  # same span
    torch.testing.assert_close(coordinates_RK, coordinates_RK.triu())  # the first k span the first k
    assert (coordinates_RK.diagonal() > 0).all()  # same sign


@settings(deadline=None, max_examples=50)
@given(sizes, st.integers(0, 1000))
def test_completed_basis_is_orthonormal_and_begins_with_the_given_one(size, seed):
    d_model, given_rank, rank = size
    basis_DR = random_basis(d_model, given_rank, seed)
    completed_DR = complete_basis(basis_DR, rank, generator(seed))
    assert completed_DR.shape == (d_model, rank)
    assert completed_DR.dtype == basis_DR.dtype
    assert off_orthonormal(completed_DR) < 2e-6
    n_common = min(given_rank, rank)
    assert torch.equal(completed_DR[:, :n_common], basis_DR[:, :n_common])


def test_completion_stays_orthogonal_when_little_room_is_left():
    d_model = 1024
    basis_DR = random_basis(d_model, d_model - 2)
    assert off_orthonormal(complete_basis(basis_DR, d_model, generator())) < 5e-6


def test_completion_depends_on_the_seed_only():
    basis_DR = random_basis(16, 3)
    first, again, other = (complete_basis(basis_DR, 8, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_completion_beyond_d_model_is_refused():
    with pytest.raises(ValueError, match="rank 9 is larger than d_model 8"):
        complete_basis(random_basis(8, 2), 9, generator())


@pytest.mark.parametrize("angle", [0.0, 1e-3, 0.4, math.pi / 2])
def test_principal_angle_of_two_lines(angle):
    a_DR = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    b_DR = torch.tensor([[math.cos(angle)], [math.sin(angle)], [0.0]], dtype=torch.float64)
    assert principal_angles(a_DR, b_DR).item() == pytest.approx(angle, abs=1e-7)


def test_principal_angles_ignore_the_choice_of_basis_and_ascend():
    basis_DR = random_basis(20, 4).double()
    rotated_DR = basis_DR @ random_basis(4, 4, seed=1).double()
    assert principal_angles(basis_DR, rotated_DR).max() < 1e-3  # float32 rounding of the inputs
    angles_R = principal_angles(basis_DR, random_basis(20, 4, seed=2).double())
    assert (angles_R.diff() >= 0).all()
    assert angles_R[-1] > 0.5  # control: other spans are told apart
