"""Conditional norms: the layer's numbers, an exact start, classes, the probe, and files."""

import json
from pathlib import Path

import pytest
import torch
from families import N_LAYERS, TEXT_CONFIGS
from transformers import AutoModelForCausalLM, PreTrainedModel

from sails_align.core.errors import InputError
from sails_align.evaluation.backends.known_classes import KnownClasses
from sails_align.models.adapters import read_adapter
from sails_align.models.clade import (
    CLASS_IDS,
    CONFIG,
    WEIGHTS,
    Clade,
    CladeConfig,
    attach,
    class_affine,
    fit_probe,
    load_clade,
    norms_after,
    save_clade,
)
from sails_align.models.hooks import decoder_layers, hidden_states_at

D, LAYER = 32, 0
CLASSES = ("none", "theft", "fraud")
IDS = torch.arange(4, 44).view(4, 10)
ROWS = torch.tensor([0, 1, 2, 1])


def model_of(family: str = "gemma2") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TEXT_CONFIGS[family], attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name:  # the gain of a fresh model is 1 everywhere
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    return model


def conditional(family: str = "gemma2", classes: tuple[str, ...] = CLASSES, std: float = 0.5) -> PreTrainedModel:
    model = model_of(family)
    clade = Clade(CladeConfig("base", None, classes, LAYER, norms_after(model, LAYER)), D)
    generator = torch.Generator().manual_seed(1)
    for tensor in clade.state_dict().values():
        tensor.copy_(std * torch.randn(tensor.shape, generator=generator))
    attach(model, clade)
    return model


def logits(model: PreTrainedModel, ids_B: torch.Tensor | None = None, train: bool = True) -> torch.Tensor:
    given = {} if ids_B is None else {CLASS_IDS: ids_B}
    with torch.no_grad():
        return model.train(train)(IDS, **given).logits


def test_the_layer_computes_what_the_official_one_does():
    """methods.md, section 21: class x channel gains and biases, a 2 x 2 map of classes."""
    gain_CD = torch.tensor([[1.0, 2, 3], [0.5, 0.5, 0.5]])
    bias_CD = torch.tensor([[0.0, 1, 0], [1, 0, -1]])
    x_SD = torch.arange(1.0, 13).view(3, 4).T
    weights_SC = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 0]), 2).float()
    expected = torch.tensor([[1, 2, 2.5, 4], [11, 13, 3.5, 17], [27, 30, 4.5, 36]]).T
    assert torch.equal(class_affine(x_SD, weights_SC, gain_CD, bias_CD), expected)


@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_a_zero_start_is_the_base_bit_for_bit(family: str):
    base = logits(model_of(family))
    start = conditional(family, std=0.0)
    assert torch.equal(logits(start, ROWS), base)
    assert torch.equal(logits(start, train=False), base)
    changed = conditional(family)
    assert not torch.allclose(logits(changed, ROWS), base, atol=1e-2), "control"
    with changed.disable_adapter():  # pyright: ignore
        assert torch.equal(logits(changed, ROWS), base)


@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_one_class_is_a_trained_gain_and_a_bias(family: str):
    """Also where the gain is 1 + weight: the change is of the gain, whatever the weight means."""
    changed = conditional(family, classes=("none",))
    merged, clade = model_of(family), changed.clade
    for index, path in enumerate(clade.config.norms):  # pyright: ignore
        norm = merged.get_decoder().get_submodule(path)
        norm.weight.data += clade.gain.data[index, 0]  # pyright: ignore
        bias_D = clade.bias.data[index, 0]  # pyright: ignore
        norm.register_forward_hook(lambda module, args, output, bias_D=bias_D: output + bias_D)
    torch.testing.assert_close(logits(changed), logits(merged), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(changed, train=False), logits(merged), atol=1e-4, rtol=1e-4)


def test_classes_can_be_numbered_in_any_order():
    changed = conditional()
    before, other = logits(changed, ROWS), torch.tensor([2, 0, 1])
    for parameter in (changed.clade.gain, changed.clade.bias):  # pyright: ignore
        parameter.data = parameter.data[:, other.argsort()]
    torch.testing.assert_close(logits(changed, other[ROWS]), before)
    assert not torch.allclose(logits(changed, ROWS), before, atol=1e-2), "control: with unpermuted rows"


def test_only_classes_of_the_batch_get_a_gradient():
    changed = conditional()
    changed.train()(IDS, **{CLASS_IDS: torch.tensor([1, 1, 0, 1])}).logits.sum().backward()
    for parameter in (changed.clade.gain, changed.clade.bias):  # pyright: ignore
        assert (parameter.grad[:, 2] == 0).all()  # pyright: ignore
        assert all((parameter.grad[:, index] != 0).any() for index in (0, 1))  # pyright: ignore


def test_a_certain_probe_is_a_label_and_an_evaluation_is_told_none():
    changed = conditional()
    changed.clade.probe.weight.data.zero_()  # pyright: ignore
    changed.clade.probe.bias.data = torch.tensor([-100.0, 100.0, -100.0])  # pyright: ignore
    thefts = torch.ones_like(ROWS)
    assert torch.equal(logits(changed, train=False), logits(changed, thefts))
    assert torch.equal(logits(changed, ROWS, train=False), logits(changed, thefts)), "the label does not leak"
    assert not torch.equal(logits(changed, ROWS), logits(changed, thefts)), "control"


def test_the_model_stays_causal_and_the_probe_reads_the_base():
    changed, base = conditional(), model_of()
    short = logits(changed, train=False)[:, :5]
    with torch.no_grad():
        torch.testing.assert_close(changed.eval()(IDS[:, :5]).logits, short)
        hidden = [hidden_states_at(each, [LAYER], IDS, torch.ones_like(IDS))[LAYER] for each in (changed, base)]
    assert torch.equal(*hidden)


def test_true_classes_take_the_place_of_predicted_ones_while_a_model_responds():
    changed = conditional().eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    weights = [tuple(row) for row in torch.eye(3)[ROWS].tolist()]
    told = KnownClasses(dict(zip(map(tuple, IDS.tolist()), weights, strict=True)))
    predicted = changed.generate(IDS, attention_mask=torch.ones_like(IDS), **options)  # pyright: ignore
    with told(changed):
        oracle = changed.generate(IDS, attention_mask=torch.ones_like(IDS), **options)  # pyright: ignore
        left = torch.nn.functional.pad(IDS, (2, 0))
        mask = torch.nn.functional.pad(torch.ones_like(IDS), (2, 0))
        padded = changed.generate(left, attention_mask=mask, **options)  # pyright: ignore
    assert torch.equal(padded[:, 2:], oracle)
    assert not torch.equal(oracle, predicted), "control"
    ids_BS, clade = IDS, changed.clade
    for _ in range(6):  # by whole forward passes that are told the labels
        changed.train()
        with torch.no_grad():
            next_B = changed(ids_BS, **{CLASS_IDS: ROWS}).logits[:, -1].argmax(-1)  # pyright: ignore
        ids_BS = torch.cat([ids_BS, next_B[:, None]], 1)
    assert torch.equal(ids_BS, oracle)
    assert clade.config.classes == CLASSES  # pyright: ignore


def test_generation_with_a_cache_is_that_without():
    changed = conditional().eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    texts = [changed.generate(IDS, use_cache=used, **options) for used in (True, False)]  # pyright: ignore
    assert torch.equal(*texts)


def test_the_probe_finds_classes_that_a_plane_separates():
    generator = torch.Generator().manual_seed(0)
    states_TD, truth_CD = (torch.randn(n, 8, generator=generator) for n in (400, 3))
    ids_T = (states_TD @ truth_CD.T).argmax(1)
    weight_CD, bias_C = fit_probe(states_TD, ids_T, 3)
    assert ((states_TD @ weight_CD.T + bias_C).argmax(1) == ids_T).float().mean() > 0.97
    noise_T = torch.randint(0, 3, (400,), generator=generator)
    weight_CD, bias_C = fit_probe(states_TD, noise_T, 3)
    assert ((states_TD @ weight_CD.T + bias_C).argmax(1) == noise_T).float().mean() < 0.6, "control"


def test_saved_and_loaded_it_computes_the_same(tmp_path: Path):
    changed = conditional()
    save_clade(changed.clade, tmp_path)  # pyright: ignore
    again = model_of()
    attach(again, load_clade(tmp_path))
    assert torch.equal(logits(again, train=False), logits(changed, train=False))


def test_damaged_files(tmp_path: Path):
    save_clade(conditional().clade, tmp_path)  # pyright: ignore
    with pytest.raises(InputError, match="CLADE adapter, whose norms depend on the input: it cannot be merged"):
        read_adapter(tmp_path)
    with pytest.raises(InputError, match=r"no norm layers.1.input_layernorm of width 32;\n.*--base_model"):
        attach(AutoModelForCausalLM.from_config(wider()), load_clade(tmp_path))
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, "classes": ["none"]}))
    with pytest.raises(InputError, match=r"clade.safetensors is damaged \(.*\); copy the folder again"):
        load_clade(tmp_path)
    for text in ("{", "[]", json.dumps({**values, "classes": []})):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(InputError, match=r"clade.json is damaged"):
            load_clade(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(values))
    (tmp_path / WEIGHTS).write_bytes(b"x")
    with pytest.raises(InputError, match=r"clade.safetensors is damaged"):
        load_clade(tmp_path)


def wider():
    config = type(TEXT_CONFIGS["llama"])(**{**TEXT_CONFIGS["llama"].to_dict(), "hidden_size": 64})
    assert config.num_hidden_layers == N_LAYERS
    return config


def test_a_layer_with_nothing_behind_it_is_refused():
    model = model_of()
    with pytest.raises(InputError, match="no block comes after it; choose 0 to 1"):
        norms_after(model, len(decoder_layers(model)) - 1)
    with pytest.raises(InputError, match="layer 9 is out of range"):
        norms_after(model, 9)
