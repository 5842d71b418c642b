"""Select the SAE latents that separate the aligned side from the unaligned side.

`FeatureFitter.update` (streaming) -> `TokenStats` (sums) -> `select_features` -> `FeatureSelection`.
The score is SAILS' (arXiv 2512.23260): the difference, between the two sides, of a latent's mean activation. Or it is
the latent's effect on the refusal margin (`attribution`), or the product of both.

Shapes: T tokens, D d_model, F d_sae, K chosen latents.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sails_align.core.errors import InputError
from sails_align.saes.load import ResidualSAE
from sails_align.subspace.options import BY_EFFECT
from sails_align.subspace.statistics import (
    Fitter,
    SideSums,
    TokenStats,
    check_finite,
    contrasts_of,
)

logger = logging.getLogger(__name__)

# Tokens are encoded in chunks of this many activations (T x F). On a CPU a chunk then stays in the cache, which makes
# the element-wise work some ten times quicker than on whole batches; a GPU wants large matrix products.
CPU_CHUNK = 2**20
GPU_CHUNK = 2**26

# Sums of one chunk are float32, so a variance below this share of the mean square is rounding, not signal.
VARIANCE_FLOOR = 1e-6


class FeatureFitter(Fitter):
    """Sum up the activations of every latent."""

    def __init__(self, saes: Mapping[int, ResidualSAE]) -> None:
        """Take the SAE of each layer."""
        super().__init__()
        self.saes = dict(saes)

    @torch.no_grad()
    def update(self, contrast: str, side: str, layer: int, hidden_TD: Tensor) -> None:
        """Add tokens to a side."""
        sae, key = self.saes[layer], (contrast, layer, side)
        d_sae = sae.info.d_sae
        for part_TD in hidden_TD.split(chunk_size(hidden_TD, d_sae)):
            acts_TF = sae.encode(part_TD.float())
            if key not in self._sums:
                zero_F = torch.zeros(d_sae, dtype=torch.float64, device=acts_TF.device)
                n_tokens = torch.tensor(0, device=acts_TF.device)
                self._sums[key] = SideSums(n_tokens, zero_F, sumsq=zero_F.clone(), active=zero_F.clone())
            sums = self._sums[key]
            sums.n_tokens.add_(acts_TF.shape[0])
            sums.sum.add_(acts_TF.sum(0))
            squares_TF = acts_TF.square()
            sums.sumsq.add_(squares_TF.sum(0))
            # Counting by a float sum is several times quicker than by an integer one, and exact up to 2^24 tokens.
            sums.active.add_(squares_TF.sign_().sum(0))


def chunk_size(hidden_TD: Tensor, d_sae: int) -> int:
    """Return the number of tokens to encode at a time."""
    return max(1, (CPU_CHUNK if hidden_TD.device.type == "cpu" else GPU_CHUNK) // d_sae)


@dataclass(frozen=True)
class LayerSelection:
    """Chosen latents of one layer, best first. (K,); all but the ids float64."""

    ids: Tensor
    """int64"""
    delta: Tensor
    """Mean activation on the aligned side minus that on the unaligned side."""
    score: Tensor
    rate_aligned: Tensor
    """Share, 0 to 1, of the aligned side's tokens on which the latent is active."""
    rate_unaligned: Tensor
    effect: Tensor | None = None
    """Effect on the refusal margin, positive if the latent makes refusal likelier; None unless the score needs it."""

    def items(self) -> list[tuple[str, Tensor]]:
        """Return what is known of the latents, by name."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return [(name, value_K) for name, value_K in values if value_K is not None]

    def take(self, positions_K: Tensor) -> "LayerSelection":
        """Return the latents at these positions."""
        return LayerSelection(**{name: value_K[positions_K] for name, value_K in self.items()})


@dataclass(frozen=True)
class FeatureSelection:
    """The chosen latents of every layer."""

    layers: Mapping[int, LayerSelection]
    contrast: str
    score: str

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON: lists of numbers, by layer."""
        layers = {
            str(layer): {name: value_K.tolist() for name, value_K in chosen.items()}
            for layer, chosen in self.layers.items()
        }
        return {"contrast": self.contrast, "score": self.score, "layers": layers}


def select_features(
    stats: TokenStats,
    *,
    contrast: str,
    score: str,
    top_k: int,
    side: str | None = None,
    effects: TokenStats | None = None,
) -> FeatureSelection:
    """Select the `top_k` best latents of each layer; fewer, with a warning, where fewer are ever active.

    Arguments and errors are those of `rank_features`; `top_k` must not be larger than the SAE.
    """
    for (_, layer, _), sums in stats.sums.items():
        if top_k > (d_sae := len(sums.sum)):
            raise InputError(f"top_k is {top_k}, but the SAE of layer {layer} has {d_sae} latents; choose at most that")
    ranked = rank_features(stats, contrast=contrast, score=score, side=side, effects=effects)
    for layer, firing in ranked.layers.items():
        if (n := len(firing.ids)) < top_k:
            logger.info("layer %d: only %d latents are ever active: fewer than top_k %d", layer, n, top_k)
    best = {layer: firing.take(torch.arange(min(top_k, len(firing.ids)))) for layer, firing in ranked.layers.items()}
    return FeatureSelection(best, contrast, score)


def rank_features(
    stats: TokenStats,
    *,
    contrast: str,
    score: str,
    side: str | None = None,
    effects: TokenStats | None = None,
) -> FeatureSelection:
    """Rank all active latents of each layer, highest score first; ties by id.

    Args:
        stats: sums over both sides of the contrast.
        contrast: "response", "prompt" or "both". "both" adds the two contrasts' scores, each divided by its norm over
            the latents; all else is then of the contrast in which a latent scores higher.
        score: "mean_diff", the paper's |mean over aligned - mean over unaligned|; "standardized", that divided by
            the pooled standard deviation of the two sides; "attribution", |effect on the refusal margin|; or
            "read_write", the product of "mean_diff" and "attribution": high for latents that both read the difference
            and write refusal (ours).
        side: only latents whose mean activation is higher on this side; None: all.
        effects: the latents' effects (`attribution.EffectFitter`), for the last two.

    Raises:
        InputError: if a side has no tokens, no latent of a layer fires, or activations were not finite.
    """
    names = contrasts_of(contrast)
    if not stats.layers:
        raise InputError("the feature statistics are empty: no token was averaged; check the data")
    layers = {}
    for layer in stats.layers:
        latents = _combined([_latents(stats, effects, name, layer, score) for name in names])
        # A stable sort, so that among equal scores the lower id comes first.
        order_F = latents.score.argsort(descending=True, stable=True)
        fires_F = latents.rate_aligned + latents.rate_unaligned > 0
        if side is not None:
            fires_F &= latents.delta > 0 if side == "aligned" else latents.delta < 0
        layers[layer] = latents.take(order_F[fires_F[order_F]])
        if len(layers[layer].ids) == 0:
            raise InputError(
                f"no latent of the SAE of layer {layer} is active on any averaged token;\n"
                "check that the SAE was trained on this model and at this hook point"
            )
    return FeatureSelection(layers, contrast, score)


def _latents(stats: TokenStats, effects: TokenStats | None, contrast: str, layer: int, score: str) -> LayerSelection:
    """Return every latent of a layer, in the order of the ids."""
    aligned, unaligned = stats.pair(contrast, layer)
    delta_F = aligned.mean - unaligned.mean
    check_finite(delta_F, layer)
    score_F = delta_F.abs()
    if score == "standardized":
        std_F = _pooled_std(aligned, unaligned)
        score_F = torch.where(std_F > 0, score_F / std_F, 0.0)
    effect_F = None
    if score in BY_EFFECT:
        assert effects is not None, "the score needs effects"
        # The margin is a difference, whose sign is in the sums: the effect on it is a sum of effects on its two terms.
        effect_F = sum((term.mean for term in effects.pair(contrast, layer)), torch.zeros_like(delta_F))
        check_finite(effect_F, layer)
        score_F = effect_F.abs() if score == "attribution" else effect_F.abs() * score_F
    return LayerSelection(torch.arange(len(delta_F)), delta_F, score_F, aligned.rate, unaligned.rate, effect_F)


def _pooled_std(aligned: SideSums, unaligned: SideSums) -> Tensor:
    """Return the standard deviation within the sides, weighted by their tokens, never below rounding. (F,)"""
    n_tokens = aligned.n_tokens + unaligned.n_tokens
    mean_square_F = (aligned.sumsq + unaligned.sumsq) / n_tokens
    of_means_F = (aligned.n_tokens * aligned.mean.square() + unaligned.n_tokens * unaligned.mean.square()) / n_tokens
    return torch.maximum(mean_square_F - of_means_F, VARIANCE_FLOOR * mean_square_F).sqrt()


def _combined(contrasts: Sequence[LayerSelection]) -> LayerSelection:
    """Return one contrast as it is; combine two by the rule of "both" (see `rank_features`)."""
    if len(contrasts) == 1:
        return contrasts[0]
    response, prompt = contrasts
    share_response_F, share_prompt_F = (normalize(latents.score, dim=0) for latents in contrasts)
    leads_F = share_response_F >= share_prompt_F
    of_prompt = dict(prompt.items())
    leading = {name: torch.where(leads_F, value_F, of_prompt[name]) for name, value_F in response.items()}
    return replace(LayerSelection(**leading), score=share_response_F + share_prompt_F)
