"""The initialized adapter changes nothing at first, holds the directions where it should, and trains as it should."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import normalize
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from sails_align.core.errors import InputError
from sails_align.initializers.adapter import AdapterInit, initialize
from sails_align.initializers.targets import SIDES, source_layer, target_modules_for
from sails_align.models.hooks import decoder_layers
from sails_align.models.language_model import outside_decoder
from sails_align.models.norms import GAIN_FLOOR, norm_gain
from sails_align.subspace.basis import Subspace

D_MODEL, N_LAYERS, RANK = 32, 4, 4
SHAPE = {
    "vocab_size": 50,
    "hidden_size": D_MODEL,
    "intermediate_size": 40,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 24,  # 48 wide, so that the inside of attention cannot be taken for the residual stream
    "pad_token_id": 0,
}
FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
}
SANDWICH = ("gemma2", "gemma3")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(1, 25).reshape(2, 12)


def make_model(family: str = "llama", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = FAMILIES[family](**(SHAPE | changes))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # as after training: gains differ
            nn.init.normal_(parameter, mean=0.0 if "gemma" in family else 1.0, std=0.3)
    return model.eval()


def with_lora(model: nn.Module, target_modules: Any = ALL, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**({"r": RANK, "target_modules": target_modules} | options))).eval()


def make_subspace(layers: tuple[int, ...] = (1, 2), rank: int = 3, d_model: int = D_MODEL) -> Subspace:
    generator = torch.Generator().manual_seed(7)
    bases = {layer: torch.linalg.qr(torch.randn(d_model, rank, generator=generator))[0] for layer in layers}
    return Subspace(bases, {layer: torch.ones(rank) for layer in layers}, {})


def adapted(family: str = "llama", **options: Any) -> tuple[PeftModel, AdapterInit]:
    model = with_lora(make_model(family))
    return model, initialize(model, make_subspace(), **options)


def lora(model: PeftModel, name: str, side: str, adapter_name: str = "default") -> nn.Parameter:
    return model.get_parameter(f"{name}.lora_{side}.{adapter_name}.weight")


def adapter_values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def train(model: PeftModel, steps: int = 4, reference: bool = False) -> None:
    """AdamW steps; with `reference`, each after a pass with the adapter disabled, as in DPO."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        if reference:
            with model.disable_adapter():
                logits(model)
            model.set_adapter("default")
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# --- the first forward pass


@pytest.mark.parametrize("fold_norm", [False, True])
@pytest.mark.parametrize("freeze", [False, True, "readers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_logits_are_bit_equal_to_the_base(family, freeze, fold_norm):
    base = make_model(family)
    base_logits = logits(base)
    model = with_lora(base)
    init = initialize(model, make_subspace(), freeze=freeze, fold_norm=fold_norm)
    assert len(init.modules) == 7 * N_LAYERS
    assert torch.equal(logits(model), base_logits)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(logits(model), base_logits)
    with torch.no_grad():  # control: one entry of one zero factor is enough to be seen
        module = init.modules[0]
        lora(model, module.name, "B" if module.side == "A" else "A")[0, 0] = 0.1
    assert not torch.equal(logits(model), base_logits)


def test_first_logits_are_bit_equal_in_bfloat16_and_with_saved_modules():
    base = make_model("llama").bfloat16()
    base_logits = logits(base)
    model = with_lora(base, modules_to_save=["lm_head"], use_rslora=True)
    initialize(model, make_subspace())
    assert torch.equal(logits(model), base_logits)


def test_base_weights_are_untouched():
    base = make_model("gemma2")
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = with_lora(base)
    initialize(model, make_subspace(), fold_norm=True)
    train(model)
    after = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# --- where the directions go


@pytest.mark.parametrize(
    ("path", "sources"),
    [  # SAE layers 1 and 4 of 6 blocks; readers of block l want l - 1, writers l; 2.5 would be the middle
        ("self_attn.q_proj", [1, 1, 1, 1, 4, 4]),
        ("mlp.gate_proj", [1, 1, 1, 1, 4, 4]),
        ("self_attn.o_proj", [1, 1, 1, 4, 4, 4]),
        ("mlp.down_proj", [1, 1, 1, 4, 4, 4]),
    ],
)
def test_nearest_layer_by_hand(path, sources):
    assert [source_layer(block, path, (1, 4), "nearest") for block in range(6)] == sources


def test_of_two_equally_near_layers_the_earlier_is_taken():
    assert source_layer(3, "mlp.down_proj", (4, 2), "nearest") == 2
    assert source_layer(4, "mlp.up_proj", (4, 2), "nearest") == 2


def test_sae_only_by_hand():
    readers = [source_layer(block, "self_attn.v_proj", (1, 4), "sae_only") for block in range(6)]
    writers = [source_layer(block, "self_attn.o_proj", (1, 4), "sae_only") for block in range(6)]
    assert readers == [None, None, 1, None, None, 4]
    assert writers == [None, 1, None, None, 4, None]


def test_readers_take_the_layer_before_in_A_and_writers_their_own_in_B():
    model = with_lora(make_model())
    subspace = make_subspace(layers=(0, 1, 2, 3))
    init = initialize(model, subspace, scale=0.5)
    assert len(init.modules) == 7 * N_LAYERS
    for module in init.modules:
        block = int(module.name.split(".")[4])
        reads = not module.name.endswith(("o_proj", "down_proj"))
        assert module.side == ("A" if reads else "B")
        assert module.source_layer == (max(block - 1, 0) if reads else block)
        A, B = lora(model, module.name, "A"), lora(model, module.name, "B")
        side_DR, other = (A.T, B) if reads else (B, A)
        assert not other.any()
        assert side_DR.shape == (D_MODEL, RANK)
        assert module.n_directions == 3
        torch.testing.assert_close(side_DR[:, :3], 0.5 * subspace.bases[module.source_layer])
        torch.testing.assert_close(side_DR.T @ side_DR, 0.25 * torch.eye(RANK), atol=1e-6, rtol=0)  # the fill too
        assert torch.equal(init.initial[module.name], A if reads else B)


def test_a_basis_with_more_directions_than_the_rank_gives_its_first_ones():
    model = with_lora(make_model(), rank_pattern={"o_proj": 2, "layers.1.self_attn.q_proj": 6})
    subspace = make_subspace(rank=5)
    init = initialize(model, subspace)
    ranks = {module.name: (module.rank, module.n_directions) for module in init.modules}
    assert sorted(set(ranks.values())) == [(2, 2), (4, 4), (6, 5)]
    for module in init.modules:
        values = init.initial[module.name]
        side_DR = values.T if module.side == "A" else values
        n = module.n_directions
        torch.testing.assert_close(side_DR[:, :n], subspace.bases[module.source_layer][:, :n])
        torch.testing.assert_close(side_DR.T @ side_DR, torch.eye(module.rank), atol=1e-6, rtol=0)


def test_the_fill_is_reproducible_differs_between_modules_and_follows_the_seed():
    fill = [adapted(seed=seed)[1].initial for seed in (0, 0, 1)]
    names = list(fill[0])
    assert all(torch.equal(fill[0][name], fill[1][name]) for name in names)
    assert not any(torch.equal(fill[0][name], fill[2][name]) for name in names)
    q, k = names[0], names[1]  # same side, block and source layer
    assert torch.equal(fill[0][q][:3], fill[0][k][:3])
    assert not torch.equal(fill[0][q][3], fill[0][k][3])
    few = with_lora(make_model(), ["v_proj"])  # and does not depend on which other modules have adapters
    assert all(torch.equal(fill[0][n], v) for n, v in initialize(few, make_subspace()).initial.items())


def test_only_the_named_adapter_is_initialized():
    model = with_lora(make_model())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    before = adapter_values(model)
    init = initialize(model, make_subspace(), freeze=True, adapter_name="other")
    assert {module.rank for module in init.modules} == {2}
    changed = {name for name, value in adapter_values(model).items() if not torch.equal(value, before[name])}
    assert changed == {f"{module.name}.lora_A.other.weight" for module in init.modules}
    assert all(p.requires_grad for name, p in model.named_parameters() if "default" in name)


# --- training


@pytest.mark.parametrize("family", FAMILIES)
def test_both_factors_train_under_init(family):
    model, _ = adapted(family)
    before = adapter_values(model)
    train(model)
    assert not any(torch.equal(value, before[name]) for name, value in adapter_values(model).items())


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_other_factor_trains_under_freeze(family, reference):
    model, init = adapted(family, freeze=True)
    train(model, reference=reference)
    for module in init.modules:
        kept, trained = ("A", "B") if module.side == "A" else ("B", "A")
        assert torch.equal(lora(model, module.name, kept), init.initial[module.name])
        assert lora(model, module.name, trained).any()
        assert not lora(model, module.name, kept).requires_grad
        assert lora(model, module.name, trained).requires_grad


def test_requires_grad_alone_would_not_freeze():
    """A control on PEFT: once this fails, `_freeze` could be a plain `requires_grad_(False)`."""
    model, init = adapted()
    frozen = lora(model, init.modules[0].name, init.modules[0].side)
    frozen.requires_grad_(False)
    with model.disable_adapter():
        pass
    assert frozen.requires_grad


def test_frozen_side_stays_frozen_when_a_checkpoint_is_resumed(tmp_path):
    model, init = adapted(freeze=True)
    train(model, steps=1)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)  # what Trainer does
    train(model)
    for module in init.modules:
        assert torch.equal(lora(model, module.name, module.side), init.initial[module.name])


@pytest.mark.parametrize("freeze", [1, np.True_])
def test_any_true_value_freezes(freeze):
    model, init = adapted(freeze=freeze)
    before = adapter_values(model)
    train(model)
    frozen = {f"{module.name}.lora_{module.side}.default.weight" for module in init.modules}
    changed = {name for name, value in adapter_values(model).items() if not torch.equal(value, before[name])}
    assert changed.isdisjoint(frozen)
    assert changed


# --- saving and merging


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_reloaded_and_merged_models_compute_the_same(family, freeze, tmp_path):
    model, _ = adapted(family, freeze=freeze, fold_norm=True)
    train(model)
    trained_logits = logits(model)
    assert (trained_logits - logits(make_model(family))).abs().max() > 1e-2  # control: something was trained
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    assert torch.equal(logits(reloaded), trained_logits)
    torch.testing.assert_close(logits(model.merge_and_unload()), trained_logits, atol=1e-5, rtol=0)


# --- fold_norm


@pytest.mark.parametrize("family", FAMILIES)
def test_gain_is_of_the_norm_that_feeds_a_reader_or_follows_a_writer(family):
    model = make_model(family)
    inputs: dict[nn.Module, torch.Tensor] = {}
    outputs: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        inputs[module], outputs[module] = args[0], output

    blocks = decoder_layers(model)
    gains = [{path: norm_gain(block, path) for path in SIDES} for block in blocks]  # before the hooks: it runs the norm
    norms = [[m for name, m in block.named_children() if name.endswith("norm")] for block in blocks]
    for block, block_norms in zip(blocks, norms, strict=True):
        for module in [*block_norms, *(block.get_submodule(path) for path in SIDES)]:
            module.register_forward_hook(keep)
    logits(model)
    for block, block_norms, block_gains in zip(blocks, norms, gains, strict=True):
        for path, side in SIDES.items():
            gain_D, module = block_gains[path], block.get_submodule(path)
            if side == "A":
                beside = [norm for norm in block_norms if torch.equal(outputs[norm], inputs[module])]
            else:
                beside = [norm for norm in block_norms if torch.equal(inputs[norm], outputs[module])]
            assert len(beside) == (1 if side == "A" or family in SANDWICH else 0)
            if not beside:
                assert gain_D is None  # the output is added to the residual stream as it is
                continue
            x = inputs[beside[0]]
            normed = x * x.square().mean(dim=-1, keepdim=True).add(1e-6).rsqrt()
            torch.testing.assert_close(normed * gain_D, outputs[beside[0]], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fold_norm", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_effective_directions_are_those_of_the_basis_if_the_norm_is_folded(family, fold_norm):
    model = with_lora(make_model(family))
    subspace = make_subspace()
    init = initialize(model, subspace, fold_norm=fold_norm, scale=2.0)
    cosines = {"A": [], "B": []}
    for module in init.modules:
        block, path = int(module.name.split(".layers.")[1].split(".")[0]), module.name.split(".", 5)[5]
        effective_DR = effective_directions(decoder_layers(model)[block], path, init.initial[module.name], family)
        basis_DR = subspace.bases[module.source_layer]
        cosines[module.side].append((normalize(effective_DR[:, :3], dim=0) * basis_DR).sum(dim=0))
        side_DR = init.initial[module.name].T if module.side == "A" else init.initial[module.name]
        torch.testing.assert_close(side_DR.norm(dim=0), torch.full((RANK,), 2.0))
    exact_if = {"A": fold_norm, "B": fold_norm or family not in SANDWICH}
    for side, exact in exact_if.items():
        lowest = torch.cat(cosines[side]).min().item()
        assert lowest > 0.9999 if exact else lowest < 0.99  # the second is the control


@torch.no_grad()
def effective_directions(block: nn.Module, path: str, values: torch.Tensor, family: str) -> torch.Tensor:
    """Directions (D, R) of the residual stream that a factor reads or writes, measured through the norm."""
    names = {"self_attn": ("input_layernorm", "post_attention_layernorm"), "mlp": ("pre_feedforward_layernorm",) * 2}
    if family not in SANDWICH:
        names["mlp"] = ("post_attention_layernorm", "")
    elif path == "mlp.down_proj":
        names["mlp"] = ("", "post_feedforward_layernorm")
    before, after = names[path.partition(".")[0]]
    generator = torch.Generator().manual_seed(3)
    if SIDES[path] == "A":  # what comes out is linear in x but for the division by its rms
        x_ND = torch.randn(200, D_MODEL, generator=generator)
        read_NR = block.get_submodule(before)(x_ND) @ values.T * x_ND.square().mean(1, keepdim=True).sqrt()
        return torch.linalg.lstsq(x_ND, read_NR).solution
    z_NR = torch.randn(200, values.shape[1], generator=generator)
    written_ND = z_NR @ values.T
    if family in SANDWICH:
        rms_N1 = written_ND.square().mean(1, keepdim=True).sqrt()
        written_ND = block.get_submodule(after)(written_ND) * rms_N1
    return torch.linalg.lstsq(z_NR, written_ND).solution.T


def test_gains_near_zero_do_not_swamp_the_direction():
    block = decoder_layers(make_model("llama"))[1]
    with torch.no_grad():
        block.input_layernorm.weight[:] = 1.0
        block.input_layernorm.weight[:4] = torch.tensor([0.0, 1e-6, -1e-6, -2.0])
    gain_D = norm_gain(block, "self_attn.q_proj")
    floor = GAIN_FLOOR * (28 + 2 + 2e-6) / D_MODEL
    expected_D = torch.ones(D_MODEL)
    expected_D[:4] = torch.tensor([floor, floor, -floor, -2.0])
    torch.testing.assert_close(gain_D, expected_D, atol=1e-5, rtol=1e-4)


def test_a_norm_that_is_no_rms_norm_is_refused():
    block = decoder_layers(make_model("llama"))[1]
    block.input_layernorm = nn.LayerNorm(D_MODEL)
    with pytest.raises(InputError, match="needs an RMSNorm, and LayerNorm is none"):
        norm_gain(block, "self_attn.q_proj")


def test_an_unknown_arrangement_of_norms_is_refused_only_if_it_matters():
    base = AutoModelForCausalLM.from_config(Olmo2Config(**SHAPE)).eval()
    base_logits = logits(base)
    model = with_lora(base)
    with pytest.raises(InputError, match=r"fold_norm does not know Olmo2DecoderLayer, whose norms are post_attention"):
        initialize(model, make_subspace(), fold_norm=True)
    initialize(model, make_subspace())
    assert torch.equal(logits(model), base_logits)


# --- target modules


def test_nearest_keeps_the_short_names():
    assert target_modules_for(make_model(), ATTENTION, make_subspace(), "nearest") == ATTENTION


def test_sae_only_names_each_module_in_full():
    base = make_model("gemma2")
    names = target_modules_for(base, ["q_proj", "o_proj", "down_proj"], make_subspace((0, 3)), "sae_only")
    prefix = "model.layers"
    assert names == [
        f"{prefix}.0.self_attn.o_proj",
        f"{prefix}.0.mlp.down_proj",
        f"{prefix}.1.self_attn.q_proj",
        f"{prefix}.3.self_attn.o_proj",
        f"{prefix}.3.mlp.down_proj",
    ]
    base_logits = logits(base)
    model = with_lora(base, names)
    init = initialize(model, make_subspace((0, 3)), layer_map="sae_only")
    assert [module.name for module in init.modules] == [f"base_model.model.{name}" for name in names]
    assert [module.source_layer for module in init.modules] == [0, 0, 0, 3, 3]
    assert torch.equal(logits(model), base_logits)


def test_many_full_names_survive_pefts_shortening_of_them(tmp_path):
    subspace = make_subspace((0, 1, 10, 11))
    base = make_model(num_hidden_layers=13)
    names = target_modules_for(base, ALL, subspace, "sae_only")
    assert len(names) == 28
    model = with_lora(base, names)
    assert len(initialize(model, subspace, layer_map="sae_only").modules) == 28
    train(model, steps=1)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(PeftModel.from_pretrained(make_model(num_hidden_layers=13), tmp_path).eval()), logits(model)
    )


def test_vision_towers_are_left_alone():
    text = {key: value for key, value in SHAPE.items() if key != "pad_token_id"}
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    base = AutoModelForCausalLM.from_config(config)
    names = target_modules_for(base, ["q_proj"], make_subspace(), "nearest")
    assert names == ["q_proj"]
    model = with_lora(base, names, exclude_modules=outside_decoder(base))
    found = {module.name.partition("model.language_model.")[2] for module in initialize(model, make_subspace()).modules}
    assert found == {f"layers.{block}.self_attn.q_proj" for block in range(N_LAYERS)}
    with pytest.raises(InputError, match=r"cannot initialize the adapters on .*vision_tower"):
        initialize(with_lora(AutoModelForCausalLM.from_config(config), ["q_proj"]), make_subspace())


def test_fused_and_unknown_names_are_refused_with_what_was_found():
    phi3 = AutoModelForCausalLM.from_config(Phi3Config(**SHAPE))
    with pytest.raises(InputError, match=r"on qkv_proj of Phi3.*\n.*\n.*self_attn.qkv_proj, mlp.gate_up_proj"):
        target_modules_for(phi3, ["qkv_proj"], make_subspace(), "nearest")
    with pytest.raises(InputError, match=r"on self_attn.q_proj of Phi3"):
        target_modules_for(phi3, ["q_proj", "o_proj"], make_subspace(), "nearest")
    with pytest.raises(InputError, match=r"on base_model.*qkv_proj.* and 1 more:\nsupported are self_attn.q_proj"):
        initialize(with_lora(phi3, ["qkv_proj"]), make_subspace())
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(InputError, match="no decoder blocks at `layers`"):
        target_modules_for(gpt2, ["c_attn"], make_subspace(), "nearest")
    with pytest.raises(InputError, match="cannot initialize adapters on no modules"):
        target_modules_for(make_model(), [], make_subspace(), "nearest")


def test_sae_only_with_nothing_left_is_refused():
    with pytest.raises(InputError, match="no q_proj or v_proj touches one of the SAE layers 3"):
        target_modules_for(make_model(), ["q_proj", "v_proj"], make_subspace((3,)), "sae_only")


# --- what is refused


def refused(match: str, model: PeftModel | None = None, subspace: Subspace | None = None, **options: Any) -> None:
    """Refused with a message of at most three lines, and nothing written."""
    model = model or with_lora(make_model())
    before = adapter_values(model)
    with pytest.raises(InputError, match=match) as error_info:
        initialize(model, subspace or make_subspace(), **options)
    assert str(error_info.value).count("\n") <= 2
    assert all(torch.equal(value, before[name]) for name, value in adapter_values(model).items())


def test_options_out_of_range_are_refused():
    refused("layer_map is 'middle'", layer_map="middle")
    refused("freeze is 'thaw'", freeze="thaw")
    refused("scale is 0", scale=0.0)
    refused("scale is nan", scale=float("nan"))
    refused("no adapter 'x'; the model has default", adapter_name="x")


def test_subspaces_of_other_models_are_refused():
    refused("d_model 16, but .* has 32", subspace=make_subspace(d_model=16))
    refused("has layer 4, but the model has blocks 0 to 3", subspace=make_subspace((1, 4)))


def test_rank_above_d_model_is_refused():
    refused("rank 33, more than d_model 32", with_lora(make_model(), r=33))


def test_adapters_without_an_sae_are_refused_under_sae_only():
    refused("layer_map is sae_only, but .*layers.0.* has an adapter and no SAE", layer_map="sae_only")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "leave out Dora"),
        ({"bias": "all"}, "leave out bias"),
        ({"lora_bias": True}, "leave out lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": False}, "init_lora_weights is False"),
        ({"layer_replication": [(0, 2), (1, 4)]}, "leave out layer_replication"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ],
)
def test_other_adapters_than_plain_lora_in_the_blocks_are_refused(options, match):
    refused(match, with_lora(make_model("llama"), **options))


def test_other_methods_than_lora_are_refused():
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    refused("only LoRA can be initialized", get_peft_model(make_model(), config))


# --- the paper's parameter shares


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ({"hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8}, "0.19"),
        ({"hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4}, "0.24"),
    ],
    ids=["9B", "2B"],
)
def test_share_of_trainable_parameters_on_gemma_2(shape, share):
    """0.19% and 0.24% in the paper. Whether the adapters count in the total does not show in two digits."""
    intermediate = {3584: 14336, 2304: 9216}[shape["hidden_size"]]
    config = Gemma2Config(**shape, intermediate_size=intermediate, head_dim=256, vocab_size=256_000)
    with torch.device("meta"):
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config), LoraConfig(r=16, target_modules=ATTENTION), low_cpu_mem_usage=True
        )
    trainable, total = model.get_nb_trainable_parameters()
    assert f"{100 * trainable / total:.2f}" == share
    assert f"{100 * trainable / (total - trainable):.2f}" == share


# --- readers and writers with bases of their own, from the onset on


def test_writers_take_their_own_basis():
    subspace, other = make_subspace(), make_subspace(rank=2)
    own = {layer: basis_DR.flip(0) for layer, basis_DR in other.bases.items()}
    split = replace(subspace, writers=own)
    model = with_lora(make_model())
    init = initialize(model, split)
    for module in init.modules:
        basis_DR = (split.bases if module.side == "A" else own)[module.source_layer]
        values = lora(model, module.name, module.side)
        directions_DR = values.T if module.side == "A" else values
        torch.testing.assert_close(directions_DR[:, : module.n_directions], basis_DR)
        assert module.n_directions == basis_DR.shape[1]


@pytest.mark.parametrize("reference", [False, True])
def test_only_readers_are_frozen_under_freeze_readers(reference):
    model, init = adapted(freeze="readers")
    before = adapter_values(model)
    train(model, reference=reference)
    after = adapter_values(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    readers = {module.name for module in init.modules if module.side == "A"}
    assert readers
    assert len(readers) < len(init.modules)
    for name in before:
        module, _, rest = name.rpartition(".lora_")
        assert (name in changed) == (module not in readers or rest.startswith("B")), name


def test_from_the_onset_on_by_hand():
    layers = {1: None, 3: None}
    assert source_layer(2, "self_attn.q_proj", layers, "from_onset", 3) is None
    assert source_layer(2, "self_attn.o_proj", layers, "from_onset", 3) is None
    assert source_layer(3, "self_attn.q_proj", layers, "from_onset", 3) == 1  # of two equally near, the earlier
    assert source_layer(3, "self_attn.o_proj", layers, "from_onset", 3) == 3
    assert source_layer(9, "mlp.up_proj", layers, "from_onset", 3) == 3
    assert source_layer(0, "self_attn.q_proj", layers, "from_onset", None) == 1  # it was not looked for


def test_blocks_before_the_onset_have_no_adapter():
    subspace = replace(make_subspace(), onset=2)
    model = make_model()
    names = target_modules_for(model, ["q_proj", "o_proj"], subspace, "from_onset")
    n_blocks = model.config.num_hidden_layers
    assert sorted(names) == sorted(f"model.layers.{b}.self_attn.{n}_proj" for b in range(2, n_blocks) for n in "qo")
    refused("is before the onset, layer 2", subspace=subspace, layer_map="from_onset")
