"""What is said of features is what the model and the SAE do."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sails_align.core.errors import InputError
from sails_align.data.tokens import TokenizedSide, tokenize_response
from sails_align.saes.explain import (
    activations_of,
    excerpt,
    logit_lens,
    meanings,
    neighbours,
    neuronpedia_label,
    neuronpedia_page,
)
from sails_align.saes.load import ResidualSAE
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource
from sails_align.testbed.build import resolve_testbed

LAYER = 3


@pytest.fixture(scope="module")
def world():
    testbed = resolve_testbed("testbed")
    model = AutoModelForCausalLM.from_pretrained(testbed.model_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(testbed.model_path)
    saes = SAESet.load(SAESource(path=testbed.sae_path), model_config=model.config, model_name=testbed.model_path)
    requests = testbed.world.requests("train_harmful", 40)
    sides = [
        tokenize_response(tokenizer, [{"role": "user", "content": request.prompt}], request.answer, 64)
        for request in requests
    ]
    return model, tokenizer, saes, sides


def latents_of(saes: dict[int, ResidualSAE], model, side: TokenizedSide) -> torch.Tensor:
    """All latents of one sequence, alone, by transformers' own hidden states. (S, F)"""
    with torch.no_grad():
        states = model(torch.tensor([side.input_ids]), output_hidden_states=True).hidden_states
    return saes[LAYER].encode(states[LAYER + 1][0])


def test_contexts_are_the_texts_with_the_highest_activations(world):
    model, tokenizer, saes, sides = world
    latents = [latents_of(saes, model, side)[1:] for side in sides]
    feature = int(torch.cat(latents).sum(0).argmax())
    (meaning,) = meanings(model, tokenizer, saes, {LAYER: [feature]}, sides)
    peaks = sorted((acts[:, feature].max().item() for acts in latents), reverse=True)
    assert [max(context.activations) for context in meaning.contexts] == pytest.approx(peaks[:3], abs=2e-3)
    for context in meaning.contexts:
        assert len(context.tokens) == len(context.activations)
        assert context.tokens[0] == "<bos>"
        assert context.activations[0] == 0.0


def test_an_excerpt_ends_with_the_token_of_the_peak() -> None:
    assert excerpt(["<bos>", "cut", "the", "rope"], [0.0, 0.1, 2.0, 1.0]) == "<bos> cut [the]"
    assert excerpt(["<bos>", "How", " do", " I", "?"], [0.0, 0.1, 0.2, 3.0, 1.0], n_before=2) == "... How do [I]"


def test_batches_do_not_change_activations(world):
    model, _, saes, sides = world
    together = activations_of(model, saes, {LAYER: [5, 296]}, sides)[LAYER]
    for side, acts_SK in zip(sides[:5], together, strict=False):
        torch.testing.assert_close(acts_SK[1:], latents_of(saes, model, side)[1:, [5, 296]], atol=1e-4, rtol=1e-4)


def test_the_lens_is_what_adding_the_direction_does_to_the_logits(world):
    model, _, _, _ = world
    generator = torch.Generator().manual_seed(0)
    state_D, direction_D = (torch.randn(model.config.hidden_size, generator=generator) for _ in range(2))
    norm, head = model.model.norm, model.lm_head
    with torch.no_grad():
        # At a state so large that the direction does not change the norm's scale, which the lens leaves out.
        state_D = 1e4 * state_D
        shift_V = head(norm(state_D + direction_D)) - head(norm(state_D))
    lens_V = logit_lens(model, direction_D[None])[:, 0]
    assert torch.corrcoef(torch.stack([shift_V, lens_V]))[0, 1] > 0.97


def test_neighbours_by_hand():
    directions_FD = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0]])
    assert neighbours(directions_FD, 0)[0] == (2, pytest.approx(0.707, abs=1e-3))
    assert [feature for feature, _ in neighbours(directions_FD, 0)] == [2, 1, 3]


def test_harm_features_promote_words_of_harm(world):
    model, tokenizer, saes, sides = world
    (meaning,) = meanings(model, tokenizer, saes, {LAYER: [296]}, sides)
    assert {"crime", "victims", "suffering"} <= set(meaning.promoted)
    assert meaning.neuronpedia is None
    assert meaning.label is None


def test_neuronpedias_page_and_cached_label(world, tmp_path, monkeypatch):
    sae = world[2][LAYER]
    monkeypatch.setenv("SAILS_CACHE", str(tmp_path))
    monkeypatch.setattr(sae.sae.cfg.metadata, "neuronpedia_id", "gemma-2-2b/12-gemmascope-res-16k")
    folder = tmp_path / "neuronpedia" / "gemma-2-2b" / "12-gemmascope-res-16k"
    folder.mkdir(parents=True)
    assert neuronpedia_page(sae, 7) == "https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/7"
    assert neuronpedia_label(sae, 7) is None
    (folder / "7.json").write_text('{"explanations": [{"description": "words of harm"}, {"description": "others"}]}')
    (folder / "8.json").write_text('{"explanations": []}')
    (folder / "9.json").write_text('{"error": "no such feature"}')
    assert neuronpedia_label(sae, 7) == "words of harm"
    assert neuronpedia_label(sae, 8) is None
    with pytest.raises(InputError, match="is no answer of Neuronpedia's"):
        neuronpedia_label(sae, 9)
    (tmp_path / "7.json").write_text('{"explanations": [{"description": "secret"}]}')
    monkeypatch.setattr(sae.sae.cfg.metadata, "neuronpedia_id", "..")
    assert neuronpedia_label(sae, 7) is None
