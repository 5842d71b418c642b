"""How far prompts are apart, from which layer on, and directions ranked against what harmless text varies in."""

import pytest
import torch
from scipy.linalg import eigh

from sails_align.core.errors import InputError
from sails_align.core.linalg import principal_angles
from sails_align.subspace.basis import principal
from sails_align.subspace.separation import BENIGN, benign_covariance, onset_of, separation
from sails_align.subspace.statistics import ActivationFitter, TokenStats

D_MODEL = 12


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(harmless_ND: torch.Tensor, harmful_ND: torch.Tensor, responses_ND: torch.Tensor | None) -> TokenStats:
    fitter = ActivationFitter()
    fitter.update("prompt", "aligned", 0, harmless_ND)
    fitter.update("prompt", "unaligned", 0, harmful_ND)
    if responses_ND is not None:
        fitter.update(BENIGN, "aligned", 0, responses_ND)
    return fitter.result()


def test_separation_is_the_distance_in_standard_deviations():
    shift_D = torch.zeros(D_MODEL)
    shift_D[3] = 2.0
    scale_D = torch.ones(D_MODEL)
    scale_D[3] = 0.5
    stats = fitted(normal(20_000, D_MODEL) * scale_D, normal(20_000, D_MODEL, seed=1) * scale_D + shift_D, None)
    # 2 over the deviation of 0.5 along it; the shrinkage adds a tenth of the mean variance to 0.25.
    expected = 2.0 / (0.25 + 0.1 * (11 + 0.25) / 12) ** 0.5
    assert separation(stats, 0) == pytest.approx(expected, rel=0.03)
    same = fitted(normal(20_000, D_MODEL), normal(20_000, D_MODEL, seed=1), None)
    assert separation(same, 0) < 0.1


def test_separation_does_not_change_with_the_units():
    harmless_ND, harmful_ND = normal(500, D_MODEL), normal(500, D_MODEL, seed=1) + 1.0
    one = separation(fitted(harmless_ND, harmful_ND, None), 0)
    assert separation(fitted(100 * harmless_ND, 100 * harmful_ND, None), 0) == pytest.approx(one)


def test_onset_is_the_first_layer_that_is_about_as_good_as_the_best():
    assert onset_of({1: 1.7, 2: 3.0, 3: 4.2}) == 3
    assert onset_of({5: 1.0, 10: 3.9, 15: 4.2, 20: 4.0}) == 10
    assert onset_of({7: 0.0}) == 7


def test_harmless_covariance_is_of_prompts_and_responses_alone():
    harmless_ND, responses_ND = normal(40, D_MODEL), 3 * normal(60, D_MODEL, seed=2)
    stats = fitted(harmless_ND, 50 * normal(40, D_MODEL, seed=1), responses_ND)
    plain_DD = torch.cat([harmless_ND, responses_ND]).double().T.cov(correction=0)
    expected_DD = plain_DD + 0.1 * plain_DD.diagonal().mean() * torch.eye(D_MODEL)
    torch.testing.assert_close(benign_covariance(stats, 0), expected_DD)


def test_directions_are_the_generalised_eigenvectors():
    rows_KD = normal(30, D_MODEL).double()
    factor_DD = normal(D_MODEL, D_MODEL, seed=3).double()
    benign_DD = factor_DD @ factor_DD.T + torch.eye(D_MODEL)
    basis_DR, _, share = principal(0, rows_KD, tau=0.7, center=False, benign_DD=benign_DD)
    values, vectors = eigh((rows_KD.T @ rows_KD).numpy(), benign_DD.numpy())
    n = basis_DR.shape[1]
    expected_DR = torch.linalg.qr(torch.from_numpy(vectors[:, ::-1][:, :n].copy()))[0]
    assert principal_angles(basis_DR, expected_DR).max() < 1e-6
    assert share == pytest.approx(values[::-1][:n].sum() / values.sum())
    torch.testing.assert_close(basis_DR.T @ basis_DR, torch.eye(n).double())


def test_what_harmless_text_varies_in_comes_last():
    rows_KD = torch.eye(D_MODEL).double()[:4]  # four directions, equally strong
    benign_DD = torch.eye(D_MODEL).double()
    benign_DD[0, 0] = 100.0
    basis_DR, _, _ = principal(0, rows_KD, tau=1.0, center=False, benign_DD=benign_DD)
    assert basis_DR[0].abs().argmax() == 3
    assert basis_DR[0, :3].abs().max() < 1e-9


def test_no_harmless_prompts():
    fitter = ActivationFitter()
    fitter.update("prompt", "unaligned", 0, normal(4, D_MODEL))
    with pytest.raises(InputError, match="no tokens on its aligned side"):
        benign_covariance(fitter.result(), 0)
