"""Discovery finds a planted latent, and not on shuffled labels; padding and batching change nothing."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM

from sails_align.core.errors import InputError
from sails_align.data.tokens import TokenizedSide
from sails_align.models.hooks import decoder_layers
from sails_align.subspace import forward as discover_module
from sails_align.subspace.forward import batches, discover
from sails_align.subspace.selection import FeatureFitter, select_features
from sails_align.subspace.statistics import ActivationFitter, TokenStats

D_MODEL, D_SAE, LAYER = 32, 24, 1
TOKENS = range(10, 22)  # latent i reads the direction of the i-th one's embedding
PLANTED_LATENT = 5
PLANTED_TOKEN = TOKENS[PLANTED_LATENT]
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def model() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, query_pre_attn_scalar=16)).eval()
    model.get_input_embeddings().weight.data *= 50  # else untrained blocks drown it
    return model


class PlantedEncoder:
    """A latent for each token of the data, and some random ones."""

    info = SimpleNamespace(d_sae=D_SAE)

    def __init__(self, model: Gemma2ForCausalLM) -> None:
        directions_FD = torch.randn(D_SAE, D_MODEL, generator=torch.Generator().manual_seed(3))
        embeddings_KD = model.get_input_embeddings()(torch.tensor(TOKENS)).detach()
        directions_FD[: len(TOKENS)] = embeddings_KD
        self.directions_FD = torch.nn.functional.normalize(directions_FD, dim=1)
        self.threshold = embeddings_KD.norm(dim=1).mean() / 3

    def encode(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return (hidden_TD @ self.directions_FD.T - self.threshold).relu()


def sequences(n: int, seed: int, *, planted: float) -> list[TokenizedSide]:
    """Random tokens of random length; a share `planted` of the averaged ones is the planted token."""
    rng = random.Random(seed)
    result = []
    for _ in range(n):
        length = rng.randint(3, 14)
        mask = [False] + [rng.random() < 0.7 for _ in range(length - 2)] + [True]
        ids = [PLANTED_TOKEN if averaged and rng.random() < planted else rng.choice(TOKENS) for averaged in mask]
        result.append(TokenizedSide(ids, mask))
    return result


def fit(model: torch.nn.Module, aligned: list[TokenizedSide], unaligned: list[TokenizedSide], **options) -> TokenStats:
    fitter = FeatureFitter({LAYER: PlantedEncoder(model)})
    discover(model, {"response": {"aligned": aligned, "unaligned": unaligned}}, [fitter], [LAYER], **options)
    return fitter.result()


def assert_same(a: TokenStats, b: TokenStats) -> None:
    for key, sums in a.sums.items():
        assert sums.n_tokens == b.sums[key].n_tokens
        assert torch.allclose(sums.sum, b.sums[key].sum, rtol=1e-4, atol=1e-4)
        assert torch.allclose(sums.sumsq, b.sums[key].sumsq, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("score", ["mean_diff", "standardized"])
@pytest.mark.parametrize("aligned_has_it", [True, False])
def test_a_planted_latent_is_found_with_its_sign(model: Gemma2ForCausalLM, score: str, aligned_has_it: bool) -> None:
    aligned = sequences(60, 0, planted=0.3 if aligned_has_it else 0.0)
    unaligned = sequences(60, 1, planted=0.0 if aligned_has_it else 0.3)
    stats = fit(model, aligned, unaligned)
    chosen = select_features(stats, contrast="response", score=score, top_k=2).layers[LAYER]
    assert chosen.ids[0] == PLANTED_LATENT
    assert (chosen.delta[0] > 0).item() is aligned_has_it
    assert chosen.score[0] > 1.15 * chosen.score[1]
    assert (chosen.rate_aligned[0] > chosen.rate_unaligned[0] + 0.1).item() is aligned_has_it


@pytest.mark.parametrize("score", ["mean_diff", "standardized"])
def test_on_shuffled_labels_it_is_not_found(model: Gemma2ForCausalLM, score: str) -> None:
    """Not chosen more often than chance would, and its score far below what it is with the true labels."""
    aligned, unaligned = sequences(60, 0, planted=0.3), sequences(60, 1, planted=0.0)
    options = {"contrast": "response", "score": score}
    true_score = select_features(fit(model, aligned, unaligned), **options, top_k=1).layers[LAYER].score.item()
    found, scores = 0, []
    for seed in range(12):
        shuffled = random.Random(seed).sample(aligned + unaligned, 120)
        every = select_features(fit(model, shuffled[:60], shuffled[60:]), **options, top_k=D_SAE).layers[LAYER]
        found += int(every.ids[0] == PLANTED_LATENT)
        scores.append(every.score[every.ids == PLANTED_LATENT].item())
    assert found <= 5
    assert sum(scores) / len(scores) < true_score / 4


def test_statistics_are_those_of_each_sequence_alone(model: Gemma2ForCausalLM) -> None:
    """Against the plainest way to compute them: whole model, one sequence at a time, no padding."""
    side = sequences(20, 2, planted=0.2)
    stats = fit(model, side, sequences(3, 3, planted=0.0)).sums["response", LAYER, "aligned"]
    acts = []
    for sequence in side:
        ids_BS = torch.tensor([sequence.input_ids])
        with torch.no_grad():
            hidden_SD = model(input_ids=ids_BS, output_hidden_states=True).hidden_states[LAYER + 1][0]
        acts.append(PlantedEncoder(model).encode(hidden_SD[torch.tensor(sequence.mask)]))
    acts_TF = torch.cat(acts).double()
    assert stats.n_tokens == len(acts_TF)
    assert torch.allclose(stats.mean, acts_TF.mean(0), atol=1e-5)
    assert torch.allclose(stats.rate, (acts_TF > 0).double().mean(0))


@settings(max_examples=12, deadline=None)
@given(batch_size=st.integers(1, 9), max_tokens=st.integers(1, 200), order=st.randoms(use_true_random=False))
def test_batching_and_order_change_nothing(model: Gemma2ForCausalLM, batch_size: int, max_tokens: int, order) -> None:
    aligned, unaligned = sequences(12, 0, planted=0.3), sequences(9, 1, planted=0.0)
    expected = fit(model, aligned, unaligned)
    order.shuffle(aligned)
    assert_same(fit(model, aligned, unaligned, batch_size=batch_size, max_tokens_per_batch=max_tokens), expected)


@settings(max_examples=12, deadline=None)
@given(n_after=st.integers(0, 9), after=st.integers(0, 63), long=st.integers(1, 30))
def test_tokens_that_are_not_averaged_change_nothing(
    model: Gemma2ForCausalLM, n_after: int, after: int, long: int
) -> None:
    """Tokens after the averaged ones, sequences without any, and the padding that a long neighbour brings."""
    aligned, unaligned = sequences(8, 0, planted=0.3), sequences(8, 1, planted=0.0)
    expected = fit(model, aligned, unaligned)
    with_more = [TokenizedSide(s.input_ids + [after] * n_after, s.mask + [False] * n_after) for s in aligned]
    with_more.insert(3, TokenizedSide([after] * long, [False] * long))
    assert_same(fit(model, with_more, unaligned), expected)


def test_what_is_averaged_does_matter(model: Gemma2ForCausalLM) -> None:
    """The control to the two tests above: another mask gives other statistics."""
    aligned, unaligned = sequences(8, 0, planted=0.3), sequences(8, 1, planted=0.0)
    everything = [TokenizedSide(s.input_ids, [True] * len(s.mask)) for s in aligned]
    a, b = (fit(model, side, unaligned).sums["response", LAYER, "aligned"] for side in (aligned, everything))
    assert not torch.allclose(a.mean, b.mean, rtol=1e-2)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    batch_size=st.integers(1, 8),
    max_tokens=st.integers(1, 120),
)
def test_batches_hold_everything_within_their_limits(lengths: list[int], batch_size: int, max_tokens: int) -> None:
    sides = [TokenizedSide([number] * length, [True] * length) for number, length in enumerate(lengths)]
    made = list(batches(sides, batch_size, max_tokens))
    assert sorted(s.input_ids[0] for batch in made for s in batch) == list(range(len(lengths)))
    for batch in made:
        longest = max(len(s.input_ids) for s in batch)
        assert len(batch) <= batch_size
        assert len(batch) == 1 or len(batch) * longest <= max_tokens


def test_sequences_are_read_as_they_are_needed(model: Gemma2ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discover_module, "WINDOW", 10)
    read, lead = 0, []

    def endless() -> Iterator[TokenizedSide]:
        nonlocal read
        while read < 100:
            read += 1
            yield TokenizedSide([11, 12], [False, True])

    class Counter:
        fed = 0

        def update(self, contrast: str, side: str, layer: int, hidden_TD: torch.Tensor) -> None:
            self.fed += len(hidden_TD)
            lead.append(read - self.fed)

    discover(model, {"response": {"aligned": endless()}}, [Counter()], [LAYER], batch_size=4)
    assert read == 100
    assert max(lead) < 10


def test_all_fitters_get_every_contrast_and_layer(model: Gemma2ForCausalLM) -> None:
    latents, moments = FeatureFitter({0: PlantedEncoder(model), 2: PlantedEncoder(model)}), ActivationFitter()
    sides = {"aligned": sequences(3, 0, planted=0.0), "unaligned": sequences(4, 1, planted=0.0)}
    discover(model, {"response": sides, "prompt": dict(reversed(sides.items()))}, [latents, moments], [0, 2])
    keys = {(c, layer, s) for c in ("response", "prompt") for layer in (0, 2) for s in ("aligned", "unaligned")}
    assert set(latents.result().sums) == set(moments.result().sums) == keys
    counts = {key: sums.n_tokens.item() for key, sums in moments.result().sums.items()}
    assert counts == {key: sums.n_tokens.item() for key, sums in latents.result().sums.items()}


def test_low_precision_models_are_encoded_in_float32(model: Gemma2ForCausalLM) -> None:
    aligned, unaligned = sequences(10, 0, planted=0.3), sequences(10, 1, planted=0.0)
    expected = fit(model, aligned, unaligned).sums["response", LAYER, "aligned"].mean
    half = Gemma2ForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    stats = fit(half.bfloat16(), aligned, unaligned)  # PlantedEncoder could not multiply bfloat16
    assert torch.allclose(stats.sums["response", LAYER, "aligned"].mean, expected, atol=0.05)


class Failing:
    def update(self, contrast: str, side: str, layer: int, hidden_TD: torch.Tensor) -> None:
        raise RuntimeError("no")


def test_the_model_is_left_as_it_was(model: Gemma2ForCausalLM) -> None:
    hooks = [dict(block._forward_hooks) for block in decoder_layers(model)]  # transformers leaves some of its own
    sides = {"response": {"aligned": sequences(2, 0, planted=0.0)}}
    model.train()
    try:
        with pytest.raises(RuntimeError, match="no"):
            discover(model, sides, [Failing()], [LAYER])
        assert model.training
    finally:
        model.eval()
    discover(model, sides, [], [LAYER])
    assert not model.training
    assert [dict(block._forward_hooks) for block in decoder_layers(model)] == hooks


@pytest.mark.parametrize("side", [[], [TokenizedSide([1, 2], [False, False])]])
def test_a_side_without_tokens_is_refused(model: Gemma2ForCausalLM, side: list[TokenizedSide]) -> None:
    with pytest.raises(InputError, match="unaligned side of the 'response' contrast"):
        fit(model, sequences(2, 0, planted=0.0), side)


def test_progress_goes_to_stderr(
    model: Gemma2ForCausalLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sails_align.core.progress.FIRST_LINE", 0.0)  # seconds of work
    sides = {"prompt": {"aligned": sequences(3, 0, planted=0.0)}}
    discover(model, sides, [], [LAYER])
    assert capsys.readouterr() == ("", "")
    discover(model, sides, [], [LAYER], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "prompt contrast, aligned side" in err
    assert "3 of 3" in err
