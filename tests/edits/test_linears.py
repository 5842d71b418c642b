"""Linear layers are found by place, in files and in memory, whatever they are called there."""

from pathlib import Path

import pytest
import torch
from families import GEMMA3_MULTIMODAL, N_LAYERS
from family import Family
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from sails_align.core.errors import InputError
from sails_align.edits.linears import PATHS, WRITERS, dense_model, linears_of
from sails_align.edits.methods.rosi import edit
from sails_align.edits.options import RosiOptions
from sails_align.edits.weights import open_weights


def test_of_a_multimodal_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GEMMA3_MULTIMODAL)
    model.save_pretrained(tmp_path)
    weights = open_weights(tmp_path)
    places = linears_of(weights)
    assert len(places) == len(PATHS) * N_LAYERS
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in places
    assert all(torch.equal(place.of(model).weight, weights.stored(name)) for name, place in places.items())
    assert len(linears_of(weights, WRITERS)) == 2 * N_LAYERS


def test_another_architecture_is_refused(family: Family, tmp_path: Path) -> None:
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(family.base).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"no mlp.down_proj in block 0: its architecture \(gpt2\) is not supported"):
        edit(tmp_path / "gpt2", tmp_path / "out", RosiOptions())
    assert not (tmp_path / "out").exists()


def test_a_model_with_its_adapters_updates(family: Family) -> None:
    weights = open_weights(family.adapter)
    model = dense_model(weights, "cpu")
    assert all(torch.equal(place.of(model).weight, weights.get(name)) for name, place in linears_of(weights).items())
