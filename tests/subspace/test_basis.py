"""A planted subspace is recovered from noisy decoder directions; what comes out is orthonormal whatever goes in."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import energy_inside

from sails_align.core.artifacts import save_artifact
from sails_align.core.errors import InputError
from sails_align.core.linalg import principal_angles
from sails_align.subspace.basis import Subspace, build_subspace
from sails_align.subspace.options import DiscoveryOptions
from sails_align.subspace.selection import FeatureSelection, LayerSelection

D_MODEL = 48


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(d_model: int, rank: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d_model, rank, generator=generator(seed)))[0]


def saes_of(decoders: dict[int, torch.Tensor]) -> Any:
    return {layer: SimpleNamespace(W_dec_FD=W_dec_FD) for layer, W_dec_FD in decoders.items()}


def select(ids: dict[int, list[int]], scores: list[float] | None = None, sign: float = 1.0) -> FeatureSelection:
    """Chosen features with the scores given, or descending ones."""
    layers = {}
    for layer, chosen in ids.items():
        score_K = torch.tensor(scores or [1.0 - 0.01 * k for k in range(len(chosen))], dtype=torch.float64)
        rate_K = torch.full_like(score_K, 0.5)
        layers[layer] = LayerSelection(torch.tensor(chosen, dtype=torch.long), sign * score_K, score_K, rate_K, rate_K)
    return FeatureSelection(layers, "response", "mean_diff")


def build(W_dec_FD, n_chosen=None, *, tau=0.8, weighting=False, center=False, **chosen) -> Subspace:
    """The subspace of the first rows of a decoder at layer 3."""
    selection = select({3: list(range(n_chosen or len(W_dec_FD)))}, **chosen)
    return build_subspace(selection, saes_of({3: W_dec_FD}), tau=tau, weighting=weighting, center=center, provenance={})


def planted(d_planted: int, n_features: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Basis (D, d) and directions (K, D) inside its span but for noise of the given relative size."""
    basis_DR = orthonormal(D_MODEL, d_planted, seed)
    coordinates_KR = torch.nn.functional.normalize(
        torch.randn(n_features, d_planted, generator=generator(seed + 1)), dim=1
    )
    noise_KD = noise * torch.randn(n_features, D_MODEL, generator=generator(seed + 2)) / math.sqrt(D_MODEL)
    return basis_DR, coordinates_KR @ basis_DR.T + noise_KD


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weighting", [False, True])
def test_planted_subspace_is_recovered(weighting, center):
    basis_DR, W_dec_FD = planted(4, 64, noise=0.1)
    found_DR = build(W_dec_FD, tau=0.95, weighting=weighting, center=center).bases[3]
    assert found_DR.shape == (D_MODEL, 4)
    assert principal_angles(found_DR, basis_DR).max() < 0.1
    # Control: as many random directions are not in that subspace, nor spanned by four.
    random_FD = torch.randn(64, D_MODEL, generator=generator(9))
    control_DR = build(random_FD, tau=0.95, weighting=weighting, center=center).bases[3]
    assert control_DR.shape[1] > 20
    assert principal_angles(control_DR[:, :4], basis_DR).max() > 1.0


def test_recovery_gets_better_with_less_noise_and_with_more_features():
    def error(n_features: int, noise: float) -> float:
        basis_DR, W_dec_FD = planted(4, n_features, noise)
        return principal_angles(build(W_dec_FD, tau=1.0).bases[3][:, :4], basis_DR).max().item()

    assert error(64, 0.01) < error(64, 0.1) < error(64, 0.5)
    assert error(512, 0.3) < error(32, 0.3)


@pytest.mark.parametrize("center", [False, True])
def test_tau_one_spans_all_directions(center):
    W_dec_FD = torch.randn(10, D_MODEL, generator=generator(0))
    basis_DR = build(W_dec_FD, tau=1.0, center=center).bases[3]
    assert basis_DR.shape == (D_MODEL, 9 if center else 10)
    rows_KD = torch.nn.functional.normalize(W_dec_FD, dim=1)
    rows_KD = rows_KD - rows_KD.mean(dim=0) if center else rows_KD
    assert energy_inside(rows_KD.T, basis_DR) == pytest.approx(1.0, abs=1e-6)


def test_tau_one_does_not_take_rounding_for_directions():
    _, W_dec_FD = planted(4, 64, noise=0.0)
    assert build(W_dec_FD, tau=1.0).bases[3].shape == (D_MODEL, 4)


def test_tau_is_the_share_of_the_squared_singular_values():
    scores = [
        4.0,
        3.0,
        2.0,
        1.0,
    ]  # of orthogonal rows: singular values 4 : 3 : 2 : 1, squares 16 : 9 : 4 : 1 of 30
    kept = {}
    for tau in (0.5, 16 / 30 - 1e-9, 0.54, 25 / 30 - 1e-9, 25 / 30 + 1e-9, 0.96, 0.97, 1.0):
        subspace = build(torch.eye(4, D_MODEL), tau=tau, weighting=True, scores=scores)
        kept[tau] = subspace.bases[3].shape[1]
        assert subspace.provenance["layers"]["3"]["variance_kept"] >= tau - 1e-12
    assert list(kept.values()) == [1, 1, 2, 2, 3, 3, 4, 4]
    torch.testing.assert_close(subspace.singular_values[3], torch.tensor([1.0, 0.75, 0.5, 0.25]))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 30),
    st.integers(0, 1000),
    st.booleans(),
    st.booleans(),
    st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5),
)
def test_orthonormal_ordered_and_monotone_in_tau(n_features, seed, weighting, center, taus):
    W_dec_FD = torch.randn(n_features, D_MODEL, generator=generator(seed)) * torch.linspace(1, 5, n_features)[:, None]
    previous_DR = torch.empty(D_MODEL, 0)
    for tau in sorted(taus):
        subspace = build(W_dec_FD, tau=tau, weighting=weighting, center=center)
        basis_DR, singular_R = subspace.bases[3], subspace.singular_values[3]
        assert basis_DR.dtype == torch.float32
        torch.testing.assert_close(basis_DR.T @ basis_DR, torch.eye(basis_DR.shape[1]), atol=1e-5, rtol=0)
        assert (singular_R.diff() <= 0).all()
        assert len(singular_R) == basis_DR.shape[1] >= previous_DR.shape[1]
        torch.testing.assert_close(basis_DR[:, : previous_DR.shape[1]], previous_DR)  # the first directions stay
        previous_DR = basis_DR


def test_norms_of_decoder_rows_do_not_matter():
    W_dec_FD = torch.randn(8, D_MODEL, generator=generator(0))
    norms_F1 = torch.logspace(-3, 3, 8)[:, None]
    torch.testing.assert_close(build(W_dec_FD * norms_F1).bases[3], build(W_dec_FD).bases[3], atol=1e-5, rtol=0)


def test_weighting_puts_the_feature_with_the_highest_score_first():
    W_dec_FD = torch.eye(6, D_MODEL)
    scores = [10.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert build(W_dec_FD, tau=0.8, weighting=True, scores=scores).bases[3].shape[1] == 1
    torch.testing.assert_close(build(W_dec_FD, weighting=True, scores=scores).bases[3][:, 0], torch.eye(D_MODEL)[0])
    assert build(W_dec_FD, tau=0.8, weighting=False, scores=scores).bases[3].shape[1] == 5  # control


def test_centering_removes_the_mean_direction_and_nothing_else():
    mean_D = torch.eye(D_MODEL)[0]
    W_dec_FD = mean_D + 0.3 * torch.randn(32, D_MODEL, generator=generator(0)) / math.sqrt(D_MODEL)
    uncentred_DR = build(W_dec_FD, tau=0.5, center=False).bases[3]
    centred_DR = build(W_dec_FD, tau=0.5, center=True).bases[3]
    assert abs(uncentred_DR[:, 0] @ mean_D) > 0.95
    assert (centred_DR.T @ mean_D).abs().max() < 0.3


def test_directions_point_to_the_aligned_side():
    W_dec_FD = torch.eye(1, D_MODEL)
    torch.testing.assert_close(build(W_dec_FD, sign=1.0).bases[3], W_dec_FD.T)
    torch.testing.assert_close(build(W_dec_FD, sign=-1.0).bases[3], -W_dec_FD.T)


def test_layers_are_independent_and_only_chosen_rows_count():
    decoders = {layer: torch.randn(20, D_MODEL, generator=generator(layer)) for layer in (2, 5)}
    selection = select({5: [7, 1, 19], 2: [0, 4]})
    subspace = build_subspace(
        selection,
        saes_of(decoders),
        tau=1.0,
        weighting=False,
        center=False,
        provenance={"model": "m", "method": "other"},
    )
    assert list(subspace.bases) == [2, 5]
    assert energy_inside(decoders[5][[7, 1, 19]].T, subspace.bases[5]) == pytest.approx(1.0, abs=1e-6)
    assert energy_inside(decoders[5][[0, 4]].T, subspace.bases[5]) < 0.5
    assert energy_inside(decoders[2][[0, 4]].T, subspace.bases[2]) == pytest.approx(1.0, abs=1e-6)
    assert subspace.d_model == D_MODEL
    assert subspace.provenance["model"] == "m"
    assert subspace.provenance["method"] == "other"
    assert subspace.provenance["features"]["layers"]["5"]["ids"] == [7, 1, 19]
    json.dumps(subspace.provenance, allow_nan=False)


@pytest.mark.parametrize("tau", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_tau_outside_its_range_is_refused(tau):
    with pytest.raises(InputError, match="tau"):
        DiscoveryOptions(tau=tau)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_chosen": 1, "center": True}, "1 chosen features leave no direction after centering"),
        ({"weighting": True, "scores": [0.0, 0.0, 0.0]}, "no chosen feature has a score above 0"),
    ],
)
def test_what_cannot_be_spanned_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        build(torch.eye(3, D_MODEL), **options)


def test_identical_features_leave_nothing_after_centering():
    row_1D = torch.randn(1, D_MODEL, generator=generator(0))
    with pytest.raises(InputError, match="leave no direction after centering"):
        build(row_1D.expand(5, -1) * torch.linspace(0.1, 2, 5)[:, None], center=True)


def test_no_features_and_no_layers_are_refused():
    options = {"tau": 0.8, "weighting": False, "center": False, "provenance": {}}
    with pytest.raises(InputError, match="0 chosen features leave no direction"):
        build_subspace(select({3: []}), saes_of({3: torch.eye(3, D_MODEL)}), **options)
    with pytest.raises(InputError, match="needs layers"):
        build_subspace(select({}), {}, **options)
    with pytest.raises(InputError, match="differ in d_model"):
        build_subspace(select({1: [0], 2: [0]}), saes_of({1: torch.eye(3, 8), 2: torch.eye(3, 9)}), **options)


def test_round_trip(tmp_path):
    decoders = {layer: torch.randn(20, D_MODEL, generator=generator(layer)) for layer in (2, 10)}
    subspace = build_subspace(
        select({10: [3, 4], 2: [1, 0, 5]}),
        saes_of(decoders),
        tau=1.0,
        weighting=True,
        center=False,
        provenance={"a": [1]},
    )
    subspace.save(tmp_path / "s", "hash")
    loaded = Subspace.load(tmp_path / "s")
    assert list(loaded.bases) == list(subspace.bases) == [2, 10]
    for layer in subspace.bases:
        assert torch.equal(loaded.bases[layer], subspace.bases[layer])
        assert torch.equal(loaded.singular_values[layer], subspace.singular_values[layer])
    assert loaded.provenance == subspace.provenance


@pytest.mark.parametrize("factor", [1.01, math.nan, 0.0])
def test_a_basis_that_is_not_orthonormal_is_not_loaded(tmp_path, factor):
    tensors = {"basis.3": torch.eye(8, 2) * factor, "singular_values.3": torch.ones(2)}
    save_artifact(tmp_path / "s", "subspace", tensors, {}, "")
    with pytest.raises(InputError, match=r"basis of layer 3 .* not orthonormal"):
        Subspace.load(tmp_path / "s")


def test_another_artifact_is_not_loaded(tmp_path):
    save_artifact(tmp_path / "s", "stats", {"x": torch.ones(1)}, {}, "")
    with pytest.raises(InputError, match="holds no subspace artifact"):
        Subspace.load(tmp_path / "s")


def test_a_loaded_subspace_rounds_as_the_fresh_one_did(tmp_path):
    """Products with it are bit-equal, so a run that skips discovery repeats the run that did not."""
    columns = torch.linalg.qr(torch.randn(96, 13, generator=torch.Generator().manual_seed(0)))[0]
    values = {1: torch.ones(13)}
    for basis_DR in (columns, columns.contiguous()):
        fresh = Subspace({1: basis_DR}, values, {})
        fresh.save(tmp_path / "subspace", "hash")
        loaded = Subspace.load(tmp_path / "subspace")
        assert loaded.bases[1].stride() == fresh.bases[1].stride() == (1, 96)
        x = torch.randn(96, 7)
        assert torch.equal(loaded.bases[1].T @ x, fresh.bases[1].T @ x)


def test_writers_and_onset_are_saved(tmp_path):
    subspace = build(torch.randn(10, D_MODEL, generator=generator(0)))
    split = replace(subspace, writers={3: orthonormal(D_MODEL, 2, seed=5)}, onset=3)
    split.save(tmp_path, "hash")
    loaded = Subspace.load(tmp_path)
    assert loaded.onset == 3
    assert loaded.writers is not None
    assert torch.equal(loaded.writers[3], split.writers[3])  # pyright: ignore[reportOptionalSubscript]
    assert torch.equal(loaded.bases[3], split.bases[3])
    assert loaded.provenance == subspace.provenance
    assert split.tensors().keys() == {"basis.3", "writers.3"}
