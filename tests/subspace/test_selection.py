"""Sums are exact however the tokens arrive, and the latents chosen are those that differ."""

import logging
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sails_align.core.errors import InputError
from sails_align.subspace import selection as features
from sails_align.subspace.options import BY_EFFECT, CHOICES, DiscoveryOptions
from sails_align.subspace.selection import FeatureFitter, rank_features, select_features
from sails_align.subspace.statistics import SIDES, SideSums, TokenStats

D_SAE = 8
BY_MEANS = tuple(score for score in CHOICES["score"] if score not in BY_EFFECT)
"""Scores that need no effects; `test_attribution.py` has the others."""


class ReluEncoder:
    """Latent i is the positive part of coordinate i; the input has as many as there are latents."""

    info = SimpleNamespace(d_sae=D_SAE)

    def encode(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        assert hidden_TD.dtype == torch.float32
        return hidden_TD.relu()


def fit(sides: dict[tuple[str, int, str], torch.Tensor]) -> TokenStats:
    fitter = FeatureFitter({layer: ReluEncoder() for _, layer, _ in sides})
    for (contrast, layer, side), acts_TF in sides.items():
        fitter.update(contrast, side, layer, acts_TF)
    return fitter.result()


def response(aligned_TF: torch.Tensor, unaligned_TF: torch.Tensor, layer: int = 0) -> TokenStats:
    return fit({("response", layer, "aligned"): aligned_TF, ("response", layer, "unaligned"): unaligned_TF})


def random_acts(n_tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(n_tokens, D_SAE, generator=torch.Generator().manual_seed(seed))


def assert_same(a: TokenStats, b: TokenStats) -> None:
    assert a.sums.keys() == b.sums.keys()
    for key, sums in a.sums.items():
        other = b.sums[key]
        assert sums.n_tokens == other.n_tokens
        assert torch.equal(sums.active, other.active)
        assert torch.allclose(sums.sum, other.sum, rtol=1e-6)
        assert torch.allclose(sums.sumsq, other.sumsq, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(n_tokens=st.integers(1, 60), cuts=st.lists(st.integers(0, 60), max_size=4), chunk=st.integers(1, 100))
def test_sums_do_not_depend_on_how_tokens_arrive(n_tokens: int, cuts: list[int], chunk: int) -> None:
    acts_TF = random_acts(n_tokens, 0)
    fitter = FeatureFitter({3: ReluEncoder()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "CPU_CHUNK", chunk)
        edges = [0, *sorted(min(cut, n_tokens) for cut in cuts), n_tokens]
        for start, end in pairwise(edges):
            fitter.update("prompt", "aligned", 3, acts_TF[start:end])
    sums = fitter.result().sums["prompt", 3, "aligned"]
    exact_TF = acts_TF.relu().double()
    assert sums.n_tokens == n_tokens
    assert torch.allclose(sums.sum, exact_TF.sum(0), rtol=1e-6)
    assert torch.allclose(sums.sumsq, exact_TF.square().sum(0), rtol=1e-6)
    assert torch.equal(sums.active, (exact_TF > 0).sum(0).double())


def test_sums_are_float64_and_of_a_size_that_tokens_do_not_change() -> None:
    few, many = response(random_acts(3, 0), random_acts(3, 1)), response(random_acts(300, 0), random_acts(300, 1))
    for stats in (few, many):
        for sums in stats.sums.values():
            assert [t.shape for t in (sums.sum, sums.sumsq, sums.active)] == [(D_SAE,)] * 3
            assert {t.dtype for t in (sums.sum, sums.sumsq, sums.active)} == {torch.float64}


def test_small_differences_survive_many_tokens() -> None:
    """A float32 running sum of this many tokens would have lost the difference."""
    fitter = FeatureFitter({0: ReluEncoder()})
    base_TF = torch.full((1000, D_SAE), 100.0)
    for side, extra in (("aligned", 1e-3), ("unaligned", 0.0)):
        for _ in range(300):
            fitter.update("response", side, 0, base_TF + extra)
    chosen = select_features(fitter.result(), contrast="response", score="mean_diff", top_k=1).layers[0]
    assert chosen.delta.item() == pytest.approx(1e-3, rel=0.02)


def test_result_is_a_copy() -> None:
    fitter = FeatureFitter({0: ReluEncoder()})
    fitter.update("response", "aligned", 0, random_acts(5, 0))
    before = fitter.result()
    fitter.update("response", "aligned", 0, random_acts(5, 1))
    assert before.sums["response", 0, "aligned"].n_tokens == 5
    assert fitter.result().sums["response", 0, "aligned"].n_tokens == 10


def test_statistics_of_two_processes_add_up() -> None:
    a_TF, b_TF, c_TF = (random_acts(n, n) for n in (4, 9, 6))
    part = response(a_TF, b_TF) + fit({("response", 0, "aligned"): c_TF, ("prompt", 0, "aligned"): c_TF})
    whole = fit(
        {
            ("response", 0, "aligned"): torch.cat([a_TF, c_TF]),
            ("response", 0, "unaligned"): b_TF,
            ("prompt", 0, "aligned"): c_TF,
        }
    )
    assert_same(part, whole)


def test_mean_diff_is_the_papers_score_with_its_sign() -> None:
    aligned_TF, unaligned_TF = torch.zeros(4, D_SAE), torch.zeros(2, D_SAE)
    aligned_TF[:, 2] = torch.tensor([1.0, 0.0, 3.0, 0.0])
    unaligned_TF[:, 5] = 4.0
    aligned_TF[0, 7] = 0.4
    chosen = select_features(response(aligned_TF, unaligned_TF), contrast="response", score="mean_diff", top_k=3)
    layer = chosen.layers[0]
    assert layer.ids.tolist() == [5, 2, 7]
    assert layer.delta.tolist() == pytest.approx([-4.0, 1.0, 0.1])
    assert layer.score.tolist() == pytest.approx([4.0, 1.0, 0.1])
    assert layer.rate_aligned.tolist() == [0.0, 0.5, 0.25]
    assert layer.rate_unaligned.tolist() == [1.0, 0.0, 0.0]


def test_standardized_is_the_difference_over_the_pooled_deviation() -> None:
    aligned_TF, unaligned_TF = random_acts(50, 0) + 1.0, random_acts(80, 1) + 0.7
    ranked = rank_features(response(aligned_TF, unaligned_TF), contrast="response", score="standardized").layers[0]
    a_TF, u_TF = aligned_TF.relu().double(), unaligned_TF.relu().double()
    pooled_F = ((a_TF.var(0, correction=0) * 50 + u_TF.var(0, correction=0) * 80) / 130).sqrt()
    expected_F = (a_TF.mean(0) - u_TF.mean(0)).abs() / pooled_F
    assert torch.allclose(ranked.score, expected_F[ranked.ids], rtol=1e-4)
    assert ranked.ids.tolist() == expected_F.argsort(descending=True).tolist()


def test_standardized_prefers_the_reliable_latent_and_mean_diff_the_loud_one() -> None:
    aligned_TF, unaligned_TF = torch.zeros(100, D_SAE), torch.zeros(100, D_SAE)
    aligned_TF[:, 1] = 1.0 + 0.1 * torch.rand(100, generator=torch.Generator().manual_seed(0))
    aligned_TF[:4, 2] = 50.0  # on average 2
    stats = response(aligned_TF, unaligned_TF)
    assert select_features(stats, contrast="response", score="standardized", top_k=1).layers[0].ids.tolist() == [1]
    assert select_features(stats, contrast="response", score="mean_diff", top_k=1).layers[0].ids.tolist() == [2]


def test_a_constant_latent_has_a_finite_score() -> None:
    aligned_TF, unaligned_TF = random_acts(20, 0), random_acts(20, 1)
    aligned_TF[:, 3], unaligned_TF[:, 3] = 2.0, 1.0
    chosen = select_features(response(aligned_TF, unaligned_TF), contrast="response", score="standardized", top_k=1)
    assert chosen.layers[0].ids.tolist() == [3]
    assert chosen.layers[0].score.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), score=st.sampled_from(BY_MEANS), top_k=st.integers(1, D_SAE - 1))
def test_selection_properties(seed: int, score: str, top_k: int) -> None:
    """Fewer are a prefix of more; swapped sides only flip the signs; the order of the latents does not matter."""
    aligned_TF, unaligned_TF = random_acts(12, seed), random_acts(9, seed + 1000) + 0.3
    options = {"contrast": "response", "score": score}
    stats = response(aligned_TF, unaligned_TF)
    chosen = select_features(stats, **options, top_k=top_k).layers[0]
    every = rank_features(stats, **options).layers[0]
    assert chosen.ids.tolist() == every.ids[:top_k].tolist()
    assert (chosen.score.diff() <= 0).all()

    swapped = select_features(response(unaligned_TF, aligned_TF), **options, top_k=top_k).layers[0]
    assert torch.equal(swapped.ids, chosen.ids)
    assert torch.allclose(swapped.delta, -chosen.delta)
    assert torch.equal(swapped.rate_aligned, chosen.rate_unaligned)

    order_F = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(seed))
    permuted = select_features(response(aligned_TF[:, order_F], unaligned_TF[:, order_F]), **options, top_k=top_k)
    assert torch.equal(order_F[permuted.layers[0].ids], chosen.ids)


@pytest.mark.parametrize("score", BY_MEANS)
def test_ties_are_broken_by_id(score: str) -> None:
    aligned_TF = torch.tensor([[1.0], [2.0]]).expand(2, D_SAE).clone()
    chosen = select_features(response(aligned_TF, torch.zeros(2, D_SAE)), contrast="response", score=score, top_k=5)
    assert chosen.layers[0].ids.tolist() == [0, 1, 2, 3, 4]


def test_latents_that_never_fire_are_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    aligned_TF, unaligned_TF = -torch.ones(3, D_SAE), -torch.ones(3, D_SAE)
    aligned_TF[0, 6], unaligned_TF[1, 4] = 1.0, 2.0
    stats = response(aligned_TF, unaligned_TF, layer=2)
    with caplog.at_level(logging.INFO):
        chosen = select_features(stats, contrast="response", score="mean_diff", top_k=3)
    assert chosen.layers[2].ids.tolist() == [4, 6]
    assert "only 2 latents" in caplog.text


def both(scale_of_response: float) -> TokenStats:
    """Latent 1 differs on responses, latent 2 on prompts (the other way round), latent 3 somewhat on both."""
    zeros_TF = 0.01 * random_acts(10, 0).abs()
    response_TF, prompt_TF = zeros_TF.clone(), zeros_TF.clone()
    response_TF[:, 1], response_TF[:, 3] = 1.0, 0.8
    prompt_TF[:, 2], prompt_TF[:, 3] = 1.0, 0.8
    return fit(
        {
            ("response", 0, "aligned"): scale_of_response * response_TF,
            ("response", 0, "unaligned"): scale_of_response * zeros_TF,
            ("prompt", 0, "aligned"): zeros_TF,
            ("prompt", 0, "unaligned"): prompt_TF,
        }
    )


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_both_lets_neither_contrast_outweigh_the_other(scale: float) -> None:
    chosen = select_features(both(scale), contrast="both", score="mean_diff", top_k=3).layers[0]
    assert chosen.ids[0] == 3
    assert sorted(chosen.ids.tolist()) == [1, 2, 3]
    delta = dict(zip(chosen.ids.tolist(), chosen.delta.tolist(), strict=True))
    assert delta[1] > 0 > delta[2]  # each of the contrast in which it scores higher


def test_one_contrast_does_not_look_at_the_other() -> None:
    stats = both(1.0)
    assert select_features(stats, contrast="response", score="mean_diff", top_k=1).layers[0].ids.tolist() == [1]
    assert select_features(stats, contrast="prompt", score="mean_diff", top_k=1).layers[0].ids.tolist() == [2]


def test_selection_as_json() -> None:
    chosen = select_features(both(1.0), contrast="both", score="mean_diff", top_k=2).to_json()
    assert chosen["contrast"] == "both"
    assert chosen["score"] == "mean_diff"
    assert set(chosen["layers"]) == {"0"}
    assert {name: len(values) for name, values in chosen["layers"]["0"].items()} == dict.fromkeys(
        ["ids", "delta", "score", "rate_aligned", "rate_unaligned"], 2
    )


def test_bad_input_is_named() -> None:
    stats = response(random_acts(4, 0), random_acts(4, 1), layer=7)
    options = {"contrast": "response", "score": "mean_diff", "top_k": 2}
    for change, message in [
        ({"top_k": 0}, "top_k is 0"),
        ({"score": "best"}, "'best'.*mean_diff"),
        ({"contrast": "all"}, "'all'.*response"),
    ]:
        with pytest.raises(InputError, match=message):
            DiscoveryOptions(**change)
    with pytest.raises(InputError, match=r"top_k is 9.*layer 7.* 8"):
        select_features(stats, **options | {"top_k": 9})
    with pytest.raises(InputError, match="'prompt' contrast has no tokens on its aligned side"):
        select_features(stats, **{**options, "contrast": "both"})
    with pytest.raises(InputError, match="not finite"):
        select_features(response(torch.full((2, D_SAE), torch.inf), random_acts(4, 1)), **options)
    with pytest.raises(InputError, match="no latent of the SAE of layer 0"):
        select_features(response(-torch.ones(2, D_SAE), -torch.ones(2, D_SAE)), **options)
    with pytest.raises(InputError, match="empty"):
        select_features(TokenStats({}), **options)


def test_latents_of_one_side_alone():
    aligned_TF = torch.tensor([[3.0, 0, 1, 0, 0, 0, 0, 0]] * 2)
    unaligned_TF = torch.tensor([[0.0, 2, 0, 5, 0, 0, 0, 0]] * 2)
    stats = response(aligned_TF, unaligned_TF)
    options = {"contrast": "response", "score": "mean_diff"}
    assert rank_features(stats, **options).layers[0].ids.tolist() == [3, 0, 1, 2]
    assert rank_features(stats, **options, side="unaligned").layers[0].ids.tolist() == [3, 1]
    assert select_features(stats, **options, top_k=1, side="aligned").layers[0].ids.tolist() == [0]


def test_effects_are_combined_and_kept_with_their_signs() -> None:
    """Of two contrasts, each divided by its norm; a latent's sign is that of the contrast in which it scores higher."""
    of_response, of_prompt = torch.zeros(D_SAE).double(), torch.zeros(D_SAE).double()
    of_response[1], of_response[3] = -30.0, 40.0
    of_prompt[2], of_prompt[3] = 0.8, -0.6
    effects = TokenStats(
        {
            (contrast, 0, side): SideSums(torch.tensor(4), 4 * share * effect_F)
            for contrast, effect_F in (("response", of_response), ("prompt", of_prompt))
            for side, share in (("aligned", 3.0), ("unaligned", -2.0))
        }
    )
    ranked = rank_features(both(1.0), contrast="both", score="attribution", effects=effects).layers[0]
    assert ranked.ids[:3].tolist() == [3, 2, 1]
    assert ranked.score[:3].tolist() == pytest.approx([0.8 + 0.6, 0.8, 0.6])
    assert ranked.effect is not None
    assert ranked.effect[:3].tolist() == pytest.approx([40.0, 0.8, -30.0])
    one = rank_features(both(1.0), contrast="prompt", score="attribution", effects=effects).layers[0]
    assert one.ids[:2].tolist() == [2, 3]
    assert one.score[:2].tolist() == pytest.approx([0.8, 0.6])


def test_a_side_still_limits_latents_whose_effect_is_the_score() -> None:
    effects = TokenStats({("prompt", 0, side): SideSums(torch.tensor(1), torch.ones(D_SAE)) for side in SIDES})
    ranked = rank_features(both(1.0), contrast="prompt", score="attribution", side="unaligned", effects=effects)
    assert (ranked.layers[0].delta < 0).all()
    assert len(ranked.layers[0].ids) < len(
        rank_features(both(1.0), contrast="prompt", score="attribution", effects=effects).layers[0].ids
    )


def test_a_latent_that_reads_and_writes_is_before_those_that_do_one_of_them() -> None:
    """Latent 2 differs most and has no effect, 5 has the largest effect and does not differ; 3 has some of both."""
    effect_F = torch.zeros(D_SAE).double()
    effect_F[3], effect_F[5] = -0.5, 9.0
    effects = TokenStats({("prompt", 0, side): SideSums(torch.tensor(1), effect_F / 2) for side in SIDES})
    by_means, by_effect, of_both = (
        rank_features(both(1.0), contrast="prompt", score=score, effects=effects).layers[0]
        for score in ("mean_diff", "attribution", "read_write")
    )
    assert [ranked.ids[0].item() for ranked in (by_means, by_effect, of_both)] == [2, 5, 3]
    assert of_both.score[0].item() == pytest.approx(0.5 * by_means.score[1].item())
    assert of_both.score[1:].tolist() == [0.0] * (D_SAE - 1)
    assert of_both.effect is not None
    assert of_both.effect[0] == -0.5


@pytest.mark.parametrize("score", BY_EFFECT)
def test_effects_that_are_not_finite_are_refused(score: str) -> None:
    sums = {("prompt", 0, side): SideSums(torch.tensor(1), torch.full((D_SAE,), torch.nan)) for side in SIDES}
    with pytest.raises(InputError, match="not finite"):
        rank_features(both(1.0), contrast="prompt", score=score, effects=TokenStats(sums))
