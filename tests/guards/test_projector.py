"""The projector: its boundary stays where it is, it stays small, and what it learned of prompts proves nothing."""

import math

import pytest
import torch

from sails_align.guards.bounds import certified_threshold
from sails_align.guards.projector import (
    BUDGET,
    Projector,
    auc,
    balanced_cross_entropy,
    contrastive_loss,
    fit_projector,
    hidden_units,
)

D, N, SHARE, DELTA = 40, 60, 0.2, 0.05
OPTIONS = {"dimension": 3, "contrastive_weight": 0.1, "seed": 0}


def prompts(n: int, harm: float, seed: int) -> torch.Tensor:
    """Hidden states that differ by harm in one coordinate of many."""
    hidden_ND = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    hidden_ND[:, 7] += harm
    return hidden_ND


def test_the_boundary_is_frozen_and_the_rest_is_trained() -> None:
    before = torch.get_rng_state()
    fitted = fit_projector(prompts(200, 4, 1), prompts(200, 0, 2), steps=100, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(fitted.boundary, torch.tensor([1.0, 0.0, 0.0]))
    assert not any(name == "boundary" for name, _ in fitted.named_parameters())
    torch.manual_seed(0)
    fresh_state = Projector(D, 3).state_dict()
    assert not torch.equal(fitted.state_dict()["layers.0.weight"], fresh_state["layers.0.weight"])
    fresh = prompts(500, 4, 3), prompts(500, 0, 4)
    assert torch.equal(fitted.scores(fresh[0]), fitted(fresh[0])[:, 0].detach())
    assert auc(*map(fitted.scores, fresh)) > 0.9


def test_the_same_seed_fits_the_same_and_state_is_all_there_is() -> None:
    fitted, again = (fit_projector(prompts(80, 2, 1), prompts(50, 0, 2), steps=5, **OPTIONS) for _ in range(2))
    fresh_ND = prompts(20, 1, 3)
    assert torch.equal(fitted.scores(fresh_ND), again.scores(fresh_ND))
    assert torch.equal(Projector.of(fitted.state_dict()).scores(fresh_ND), fitted.scores(fresh_ND))


@pytest.mark.parametrize("d_model", [96, 576, 2304, 3584, 8192, 16384])
@pytest.mark.parametrize("dimension", [2, 8])
def test_it_has_fewer_than_200_000_parameters(d_model: int, dimension: int) -> None:
    n = sum(parameter.numel() for parameter in Projector(d_model, dimension).parameters())
    assert n < BUDGET
    assert hidden_units(d_model, dimension) >= 12


def test_losses_by_hand() -> None:
    embedded_NE = torch.tensor([[2.0, 0], [1, 0], [0, 3], [0, 1]], dtype=torch.float64)
    labels_N = torch.tensor([1.0, 1, 0, 0], dtype=torch.float64)
    assert contrastive_loss(embedded_NE, labels_N).item() == pytest.approx(math.log1p(2 * math.exp(-10)), rel=1e-6)
    mixed = contrastive_loss(embedded_NE, torch.tensor([1.0, 0, 1, 0], dtype=torch.float64))
    assert mixed.item() == pytest.approx(10 + math.log1p(2 * math.exp(-10)), rel=1e-6)
    scores_N = torch.tensor([0.0, 0, 0, math.log(3)], dtype=torch.float64)
    skewed_N = torch.tensor([1.0, 1, 1, 0], dtype=torch.float64)
    assert balanced_cross_entropy(scores_N, skewed_N).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert auc(torch.tensor([1.0, 2]), torch.tensor([0.0, 1])) == 0.875


def test_calibrating_on_prompts_that_it_was_fitted_on_breaks_the_bound() -> None:
    """The control of the simulation: with held-out prompts the bound holds, with training prompts it does not."""
    broken = {"fitted": 0, "held out": 0}
    fresh_ND, n_draws = prompts(4000, 1, 999), 12
    for draw in range(n_draws):
        harmful_ND = prompts(N, 1, 3 * draw)
        fitted = fit_projector(harmful_ND, prompts(N, 0, 3 * draw + 1), steps=100, **OPTIONS)
        scores = {"fitted": fitted.scores(harmful_ND), "held out": fitted.scores(prompts(N, 1, 3 * draw + 2))}
        grid = torch.linspace(-8, 8, 256)
        for name, scores_N in scores.items():
            threshold = certified_threshold(scores_N, grid, SHARE, DELTA)
            passed = 0.0 if threshold is None else (fitted.scores(fresh_ND) < threshold).double().mean().item()
            broken[name] += passed > SHARE
    assert broken["held out"] <= 3
    assert broken["fitted"] >= 0.9 * n_draws
