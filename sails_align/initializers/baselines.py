"""Subspaces that do not use SAE features chosen by their score: what SAILS must be compared with.

Each gives the same `Subspace` as `basis.build_subspace`, so that nothing after it differs. Ranks that a rival leaves
unfilled (a mean difference is one direction) are filled with random orthogonal directions by the adapter.

Shapes: T tokens, D d_model, F d_sae, K chosen latents, R rank, C contrasts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sails_align.core.errors import InputError
from sails_align.core.linalg import orthonormalize
from sails_align.subspace.basis import Subspace, build_subspace, principal
from sails_align.subspace.selection import FeatureSelection, FeatureStats, rank_features
from sails_align.subspace.statistics import Key, SideSums, Stats, check_finite, contrasts_of, token_count

# Lengths below this share of the largest are rounding, not directions.
RANK_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ActivationSums(SideSums):
    """Sums over the tokens of one side, of the hidden states themselves. float64."""

    sum: Tensor
    """(D,)"""
    second_moment: Tensor
    """(D, D): sum of the outer products; (0, 0) if they were not asked for."""


@dataclass(frozen=True)
class ActivationStats(Stats[ActivationSums]):
    """The first two moments of the hidden states, for each (contrast, layer, side)."""

    kind = "activation_stats"
    sums_class = ActivationSums


class ActivationFitter:
    """Adds up the hidden states and their outer products. Its memory does not depend on the number of tokens."""

    def __init__(self, *, second_moment: bool = True) -> None:
        """Choose what to add up.

        Args:
            second_moment: also the outer products, which `activation_pca` needs and `mean_diff` does not: at d_model
                3584 they take 0.1 GB for each (contrast, layer, side).
        """
        self._second_moment = second_moment
        self._sums: dict[Key, ActivationSums] = {}

    @torch.no_grad()
    def update(self, contrast: str, side: str, layer: int, hidden_TD: Tensor) -> None:
        """Add tokens to a side; the arguments are those of `FeatureFitter.update`."""
        # Some dimensions of a residual stream are hundreds of times larger than the rest: in float32 the products of
        # those would round away the others' covariance.
        hidden_TD = hidden_TD.double()
        key = (contrast, layer, side)
        if key not in self._sums:
            sum_D = hidden_TD.new_zeros(hidden_TD.shape[1])
            products_DD = torch.outer(sum_D, sum_D) if self._second_moment else sum_D.new_zeros(0, 0)
            self._sums[key] = ActivationSums(token_count(0, hidden_TD.device), sum_D, products_DD)
        sums = self._sums[key]
        sums.n_tokens.add_(hidden_TD.shape[0])
        sums.sum.add_(hidden_TD.sum(0))
        if self._second_moment:
            sums.second_moment.addmm_(hidden_TD.T, hidden_TD)

    def result(self) -> ActivationStats:
        """What was added so far; the fitter can go on."""
        return ActivationStats({key: sums.copy() for key, sums in self._sums.items()})


def random_basis(
    d_model: int, layers: Sequence[int], rank: int, seed: int, *, provenance: Mapping[str, Any]
) -> Subspace:
    """Uniformly random orthonormal directions; other ones in each layer.

    Raises:
        InputError: if rank is not within 1 and d_model.
    """
    _check_rank(rank, d_model)
    bases = {}
    for layer in layers:
        random_DR = torch.randn(d_model, rank, generator=_generator(seed, layer), dtype=torch.float64)
        bases[layer] = orthonormalize(random_DR).float()
    ones = {layer: torch.ones(rank) for layer in layers}
    return Subspace(bases, ones, {**provenance, "method": "random_basis", "rank": rank, "seed": seed})


def random_features(
    stats: FeatureStats,
    decoders: Mapping[int, Tensor],
    *,
    contrast: str,
    score: str,
    top_k: int,
    seed: int,
    tau: float,
    weighting: bool,
    center: bool,
    provenance: Mapping[str, Any],
    benign: Mapping[int, Tensor] | None = None,
) -> Subspace:
    """The paper's path, with random latents (of those that fire) in place of the ones with the highest scores.

    Args:
        stats: of the latents.
        decoders: layer -> W_dec_FD.
        contrast: as for `select_features`.
        score: as for `select_features`; here it matters only if `weighting`.
        top_k: as for `select_features`.
        seed: of the choice of latents.
        tau: as for `build_subspace`.
        weighting: as for `build_subspace`.
        center: as for `build_subspace`.
        provenance: JSON-able.
        benign: as for `build_subspace`.
    """
    ranked = rank_features(stats, contrast=contrast, score=score)
    layers = {}
    for layer, firing in ranked.layers.items():
        chosen_K = torch.randperm(len(firing.ids), generator=_generator(seed, layer))[:top_k]
        layers[layer] = firing.take(chosen_K.sort().values)  # best first, as in any selection
    return build_subspace(
        FeatureSelection(layers, contrast, score),
        decoders,
        tau=tau,
        weighting=weighting,
        center=center,
        provenance={**provenance, "method": "random_features", "seed": seed},
        benign=benign,
    )


def activation_pca(
    stats: ActivationStats,
    *,
    contrast: str,
    rank: int,
    provenance: Mapping[str, Any],
    benign: Mapping[int, Tensor] | None = None,
) -> Subspace:
    """The directions in which the hidden states of the contrast vary most: both sides pooled, their mean subtracted.

    Args:
        stats: of the hidden states.
        contrast: "response", "prompt" or "both" (all their tokens).
        rank: how many directions; fewer where the hidden states do not vary in that many.
        provenance: JSON-able.
        benign: as for `build_subspace`.

    Raises:
        InputError: if a side has no tokens, rank is not within 1 and d_model, or nothing varies.
    """
    bases, singular_values = {}, {}
    for layer in stats.layers:
        sides = [sums for name in contrasts_of(contrast) for sums in stats.pair(name, layer)]
        pooled = sum(sides[1:], start=sides[0])
        assert pooled.second_moment.numel(), "fitted with second_moment=False"
        _check_rank(rank, len(pooled.sum))
        mean_D = pooled.sum / pooled.n_tokens
        moment_DD = pooled.second_moment / pooled.n_tokens
        check_finite(moment_DD, layer)
        # Where every token is the same, rounding of the mean squares is all that is left of the covariance.
        noise = RANK_TOLERANCE**2 * moment_DD.diagonal().max().item()
        directions_DR, values_R = _principal(moment_DD - torch.outer(mean_D, mean_D), noise)
        if len(values_R) == 0:
            raise InputError(f"the hidden states of layer {layer} do not vary: give more than one token on each side")
        if benign is not None:
            rows_KD = (directions_DR * values_R).T
            directions_DR, values_R, _ = principal(layer, rows_KD, tau=1.0, center=False, benign_DD=benign[layer])
        bases[layer], singular_values[layer] = directions_DR[:, :rank].float(), values_R[:rank].float()
    own = {"method": "activation_pca", "contrast": contrast, "rank": rank}
    return Subspace(bases, singular_values, {**provenance, **own})


def mean_diff(
    stats: ActivationStats,
    *,
    contrast: str,
    provenance: Mapping[str, Any],
    benign: Mapping[int, Tensor] | None = None,
) -> Subspace:
    """The direction from the mean of the unaligned side to that of the aligned side; for "both", of each contrast.

    With "both" the basis spans the two unit directions: first what they share. The singular values are those of the
    unit directions side by side.

    Args:
        stats: of the hidden states.
        contrast: "response", "prompt" or "both".
        provenance: JSON-able; the norms of the differences are added.
        benign: as for `build_subspace`; one direction then is that of a linear discriminant.

    Raises:
        InputError: if a side has no tokens, or both sides have the same mean.
    """
    bases, singular_values, norms = {}, {}, {}
    for layer in stats.layers:
        differences_DC = torch.stack([_difference(stats, name, layer) for name in contrasts_of(contrast)], dim=1)
        norms_C = differences_DC.norm(dim=0)
        directions_DC = differences_DC / norms_C
        if benign is None:
            left_DR, values_R, _ = torch.linalg.svd(directions_DC, full_matrices=False)
        else:
            left_DR, values_R, _ = principal(layer, directions_DC.T, tau=1.0, center=False, benign_DD=benign[layer])
        n_kept = int((values_R > RANK_TOLERANCE * values_R[0]).sum())
        towards_aligned_R = torch.where(left_DR.T @ directions_DC.sum(dim=1) < 0, -1.0, 1.0)
        bases[layer] = (left_DR * towards_aligned_R)[:, :n_kept].float()
        singular_values[layer] = values_R[:n_kept].float()
        norms[str(layer)] = norms_C.tolist()
    own = {"method": "mean_diff", "contrast": contrast, "difference_norms": norms}
    return Subspace(bases, singular_values, {**provenance, **own})


def _difference(stats: ActivationStats, contrast: str, layer: int) -> Tensor:
    """Mean of the aligned side minus mean of the unaligned side. (D,)"""
    aligned, unaligned = stats.pair(contrast, layer)
    difference_D = aligned.sum / aligned.n_tokens - unaligned.sum / unaligned.n_tokens
    check_finite(difference_D, layer)
    if not difference_D.any():
        raise InputError(
            f"both sides of the {contrast!r} contrast have the same mean at layer {layer}: there is no direction;\n"
            "check that the two sides of the data differ"
        )
    return difference_D


def _principal(covariance_DD: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Eigenvectors (D, R) with a variance above the noise, and the standard deviations along them (R,); descending."""
    variances_D, directions_DD = torch.linalg.eigh(covariance_DD)
    variances_D, directions_DD = variances_D.flip(0), directions_DD.flip(1)
    n_varying = int((variances_D > noise).sum())
    return directions_DD[:, :n_varying], variances_D[:n_varying].sqrt()


def _generator(seed: int, layer: int) -> torch.Generator:
    """Each layer its own random numbers, whichever other layers there are."""
    return torch.Generator().manual_seed(seed * 100_003 + layer)


def _check_rank(rank: int, d_model: int) -> None:
    if not 1 <= rank <= d_model:
        raise InputError(f"rank {rank} is out of range; choose 1 to d_model, {d_model}")
