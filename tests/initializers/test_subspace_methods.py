"""Each method finds what is planted for it, misses what is not there, and gives orthonormal bases."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import energy_inside

from sails_align.core.errors import InputError
from sails_align.core.linalg import orthonormalize, principal_angles
from sails_align.initializers.activation_pca import ActivationPca
from sails_align.initializers.mean_difference import MeanDifference
from sails_align.initializers.random_basis import random_basis
from sails_align.initializers.random_features import RandomFeatures
from sails_align.subspace.basis import Subspace, build_subspace
from sails_align.subspace.methods import MethodInputs
from sails_align.subspace.options import DiscoveryOptions
from sails_align.subspace.selection import FeatureFitter, rank_features, select_features
from sails_align.subspace.statistics import ActivationFitter, TokenStats

D_MODEL, D_SAE = 24, 60


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n_tokens: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n_tokens, D_MODEL, generator=generator(seed))


def directions(n: int, seed: int) -> torch.Tensor:
    """Orthonormal columns (D, n)."""
    return orthonormalize(torch.randn(D_MODEL, n, generator=generator(seed)))


def fit(sides: dict[tuple[str, int, str], torch.Tensor]) -> TokenStats:
    fitter = ActivationFitter()
    for (contrast, layer, side), hidden_TD in sides.items():
        for part_TD in hidden_TD.split(50):
            fitter.update(contrast, side, layer, part_TD)
    return fitter.result()


def response(aligned_TD: torch.Tensor, unaligned_TD: torch.Tensor, layer: int = 0) -> TokenStats:
    return fit({("response", layer, "aligned"): aligned_TD, ("response", layer, "unaligned"): unaligned_TD})


def activation_pca(stats: TokenStats, *, contrast: str = "response", rank: int) -> Subspace:
    inputs = MethodInputs(contrast, stats=stats, options=DiscoveryOptions(rank=rank))
    return ActivationPca().build(inputs)


def mean_difference(stats: TokenStats, *, contrast: str = "response", **provenance: object) -> Subspace:
    return MeanDifference().build(MethodInputs(contrast, stats=stats, provenance=provenance))


def saes_of(decoders: dict[int, torch.Tensor]) -> Any:
    return {layer: SimpleNamespace(W_dec_FD=W_dec_FD) for layer, W_dec_FD in decoders.items()}


def random_features(stats: TokenStats, decoders: dict[int, torch.Tensor], **options: Any) -> Subspace:
    inputs = MethodInputs(
        stats=stats, saes=saes_of(decoders), options=DiscoveryOptions(**options), provenance={"sae": "x"}
    )
    return RandomFeatures().build(inputs)


def assert_orthonormal(subspace: Subspace) -> None:
    for basis_DR in subspace.bases.values():
        assert basis_DR.dtype == torch.float32
        assert torch.allclose(basis_DR.T @ basis_DR, torch.eye(basis_DR.shape[1]), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, D_MODEL), seed=st.integers(0, 99))
def test_random_basis(rank: int, seed: int) -> None:
    subspace = random_basis(d_model=D_MODEL, layers=[1, 4], rank=rank, seed=seed, provenance={"data": "x"})
    assert_orthonormal(subspace)
    assert subspace.bases[1].shape == (D_MODEL, rank)
    assert not torch.allclose(subspace.bases[1], subspace.bases[4])
    alone = random_basis(d_model=D_MODEL, layers=[4], rank=rank, seed=seed, provenance={})
    assert torch.equal(alone.bases[4], subspace.bases[4])
    assert subspace.provenance["method"] == "random_basis"
    assert subspace.provenance["data"] == "x"


def test_random_basis_is_another_for_another_seed() -> None:
    first, second = (random_basis(d_model=D_MODEL, layers=[0], rank=3, seed=seed, provenance={}) for seed in (0, 1))
    assert principal_angles(first.bases[0], second.bases[0]).max() > 0.5


def test_activation_statistics_are_the_moments_in_float64() -> None:
    hidden_TD = noise(130, 0)
    stats = response(hidden_TD.bfloat16(), hidden_TD, layer=3)
    sums = stats.sums["response", 3, "unaligned"]
    assert sums.n_tokens == 130
    assert torch.allclose(sums.sum, hidden_TD.double().sum(0))
    assert torch.allclose(sums.second_moment, hidden_TD.double().T @ hidden_TD.double())
    doubled = (stats + stats).sums["response", 3, "unaligned"]
    assert torch.equal(doubled.sum, 2 * sums.sum)


def test_activation_pca_finds_planted_variance() -> None:
    planted_DR = directions(3, 7)
    loud = torch.tensor([5.0, 4.0, 3.0])

    def side(seed: int) -> torch.Tensor:
        return noise(600, seed) + (torch.randn(600, 3, generator=generator(seed + 1)) * loud) @ planted_DR.T

    found = activation_pca(response(side(10), side(20)), rank=3)
    assert_orthonormal(found)
    assert principal_angles(found.bases[0], planted_DR).max() < 0.2
    assert (found.singular_values[0].diff() < 0).all()
    assert found.singular_values[0][0].item() == pytest.approx(26**0.5, rel=0.1)  # a standard deviation

    control = activation_pca(response(noise(600, 30), noise(600, 31)), rank=3)
    assert principal_angles(control.bases[0], planted_DR).max() > 0.5


def test_activation_pca_is_the_svd_of_the_pooled_centred_tokens() -> None:
    """Also far from the origin, and with one dimension that dwarfs the others, as real residual streams have."""
    aligned_TD, unaligned_TD = noise(80, 0) + 300.0, noise(50, 1) + 300.0
    for hidden_TD in (aligned_TD, unaligned_TD):
        hidden_TD[:, 5] = hidden_TD[:, 5] * 500
    found = activation_pca(response(aligned_TD, unaligned_TD), rank=6)
    pooled_TD = torch.cat([aligned_TD, unaligned_TD]).double()
    _, singular_D, right_DD = torch.linalg.svd(pooled_TD - pooled_TD.mean(0), full_matrices=False)
    assert torch.allclose(found.singular_values[0].double(), singular_D[:6] / 130**0.5, rtol=1e-4)
    assert principal_angles(found.bases[0].double(), right_DD[:6].T).max() < 1e-3


def test_activation_pca_has_no_more_directions_than_vary() -> None:
    planted_DR = directions(2, 3)
    hidden_TD = torch.randn(40, 2, generator=generator(0)) @ planted_DR.T
    found = activation_pca(response(hidden_TD, hidden_TD + 1.0), rank=8)
    assert found.bases[0].shape == (D_MODEL, 3)  # the two planted ones, and the shift between the sides


def test_activation_pca_of_both_contrasts_pools_them() -> None:
    first_D, second_D = directions(2, 5).T

    def along(direction_D: torch.Tensor, seed: int) -> torch.Tensor:
        return noise(300, seed, 0.1) + torch.randn(300, 1, generator=generator(seed + 50)) * direction_D

    stats = fit(
        {
            ("response", 0, "aligned"): along(first_D, 0),
            ("response", 0, "unaligned"): along(first_D, 1),
            ("prompt", 0, "aligned"): along(second_D, 2),
            ("prompt", 0, "unaligned"): along(second_D, 3),
        }
    )
    both = activation_pca(stats, contrast="both", rank=2).bases[0]
    assert principal_angles(both, torch.stack([first_D, second_D], 1)).max() < 0.1
    prompt = activation_pca(stats, contrast="prompt", rank=1).bases[0]
    assert energy_inside(second_D[:, None], prompt) > 0.98


def test_mean_diff_finds_the_planted_difference_and_points_to_the_aligned_side() -> None:
    planted_D = directions(1, 9)[:, 0]
    found = mean_difference(response(noise(500, 0) + 2 * planted_D, noise(400, 1), layer=6), seed=1)
    assert_orthonormal(found)
    assert found.bases[6].shape == (D_MODEL, 1)
    assert (found.bases[6][:, 0] @ planted_D).item() > 0.97
    assert found.provenance["difference_norms"]["6"] == [pytest.approx(2.0, rel=0.2)]
    assert found.provenance["seed"] == 1

    control = mean_difference(response(noise(500, 2), noise(400, 3)))
    assert abs((control.bases[0][:, 0] @ planted_D).item()) < 0.8


def test_mean_diff_needs_no_second_moments() -> None:
    with_them, without = ActivationFitter(), ActivationFitter(second_moment=False)
    for side, hidden_TD in (("aligned", noise(30, 0)), ("unaligned", noise(30, 1))):
        for fitter in (with_them, without):
            fitter.update("response", side, 4, hidden_TD)
    a, b = (mean_difference(fitter.result()) for fitter in (with_them, without))
    assert torch.equal(a.bases[4], b.bases[4])
    assert without.result().sums["response", 4, "aligned"].second_moment.numel() == 0
    with pytest.raises(AssertionError, match="second_moment"):
        activation_pca(without.result(), rank=1)


def two_contrasts(response_D: torch.Tensor, prompt_D: torch.Tensor) -> TokenStats:
    zeros_TD = torch.zeros(4, D_MODEL)
    return fit(
        {
            ("response", 0, "aligned"): zeros_TD + response_D,
            ("response", 0, "unaligned"): zeros_TD,
            ("prompt", 0, "aligned"): zeros_TD + prompt_D,
            ("prompt", 0, "unaligned"): zeros_TD,
        }
    )


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.01, 100), angle=st.floats(0.01, 1.5))
def test_mean_diff_of_both_spans_both_and_begins_with_what_they_share(scale: float, angle: float) -> None:
    u_D, v_D = directions(2, 4).T
    second_D = torch.cos(torch.tensor(angle)) * u_D + torch.sin(torch.tensor(angle)) * v_D
    found = mean_difference(two_contrasts(u_D, scale * second_D), contrast="both")
    assert_orthonormal(found)
    assert found.bases[0].shape == (D_MODEL, 2)
    assert principal_angles(found.bases[0], torch.stack([u_D, v_D], 1)).max() < 1e-2
    shared_D = found.bases[0][:, 0]
    assert (shared_D @ u_D).item() == pytest.approx((shared_D @ second_D).item(), abs=1e-3)  # the bisector
    assert (shared_D @ u_D).item() > 0


def test_mean_diff_of_two_equal_contrasts_is_one_direction() -> None:
    u_D = directions(1, 4)[:, 0]
    found = mean_difference(two_contrasts(u_D, 3 * u_D), contrast="both")
    assert found.bases[0].shape == (D_MODEL, 1)
    assert torch.allclose(found.bases[0][:, 0], u_D, atol=1e-6)


@pytest.fixture(scope="module")
def latents() -> TokenStats:
    """Layers 2 and 5; latents 0 to 4 tell the sides apart, 50 to 59 never fire."""

    class Encoder:
        info = SimpleNamespace(d_sae=D_SAE)

        def encode(self, hidden_TD: torch.Tensor) -> torch.Tensor:
            return hidden_TD.relu()

    fitter = FeatureFitter({2: Encoder(), 5: Encoder()})
    for side, shift in (("aligned", 3.0), ("unaligned", 0.0)):
        for layer in (2, 5):
            acts_TF = torch.randn(60, D_SAE, generator=generator(layer))
            acts_TF[:, :5] += shift
            acts_TF[:, 50:] = -1.0
            fitter.update("response", side, layer, acts_TF)
    return fitter.result()


@pytest.fixture(scope="module")
def decoders() -> dict[int, torch.Tensor]:
    return {layer: torch.randn(D_SAE, D_MODEL, generator=generator(100 + layer)) for layer in (2, 5)}


OPTIONS = {"contrast": "response", "score": "mean_diff", "top_k": 5}
PATH = {"tau": 0.9, "weighting": False, "center": False}


def test_random_features_fire_and_are_not_the_best(latents: TokenStats, decoders: dict[int, torch.Tensor]) -> None:
    best = select_features(latents, **OPTIONS)
    assert sorted(best.layers[2].ids.tolist()) == [0, 1, 2, 3, 4]
    seen = set()
    for seed in range(20):
        subspace = random_features(latents, decoders, **OPTIONS, **PATH, seed=seed)
        assert_orthonormal(subspace)
        ids = subspace.provenance["features"]["layers"]["2"]["ids"]
        assert len(ids) == len(set(ids)) == 5
        assert max(ids) < 50
        assert sorted(ids) != [0, 1, 2, 3, 4]
        assert ids != subspace.provenance["features"]["layers"]["5"]["ids"]
        seen.update(ids)
    assert len(seen) > 35  # uniformly: of 50 that fire, 100 draws miss 13% on average
    assert subspace.provenance["method"] == "random_features"
    assert (subspace.provenance["sae"], subspace.provenance["seed"]) == ("x", 19)


def test_random_features_go_the_same_way_as_chosen_ones(latents: TokenStats, decoders: dict[int, torch.Tensor]) -> None:
    """With every latent that fires chosen there is no chance left: it is SAILS' own subspace."""
    options = {**OPTIONS, "top_k": 50}
    mine = random_features(latents, decoders, **options, **PATH, seed=3)
    every = rank_features(latents, contrast="response", score="mean_diff")
    theirs = build_subspace(every, saes_of(decoders), **PATH, provenance={})
    for layer in (2, 5):
        assert torch.allclose(mine.bases[layer], theirs.bases[layer])


def test_saved_as_any_subspace(tmp_path: Path) -> None:
    found = mean_difference(response(noise(50, 0) + 1, noise(50, 1)))
    found.save(tmp_path / "subspace", "hash")
    loaded = Subspace.load(tmp_path / "subspace")
    assert torch.equal(loaded.bases[0], found.bases[0])
    assert loaded.provenance == found.provenance


def test_bad_input_is_named() -> None:
    stats = response(noise(5, 0), noise(5, 1))
    constant_TD = torch.ones(5, D_MODEL)
    with pytest.raises(InputError, match=r"rank 25 .*24"):
        random_basis(d_model=D_MODEL, layers=[0], rank=25, seed=0, provenance={})
    with pytest.raises(InputError, match="rank 0"):
        activation_pca(stats, rank=0)
    with pytest.raises(InputError, match="'prompt' contrast has no tokens"):
        mean_difference(stats, contrast="both")
    with pytest.raises(InputError, match="same mean"):
        mean_difference(response(constant_TD, constant_TD))
    with pytest.raises(InputError, match="do not vary"):
        activation_pca(response(constant_TD, constant_TD), rank=1)
    for method in (mean_difference, lambda stats: activation_pca(stats, rank=1)):
        with pytest.raises(InputError, match="not finite"):
            method(response(constant_TD * torch.nan, constant_TD))
