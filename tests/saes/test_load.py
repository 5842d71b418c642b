"""SAEs: the real loading code of sae-lens on a hub cache made by hand, against references written by hand."""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_cache import add_gemma_scope, add_gemma_scope_2, add_llama_scope, add_to_cache, sae_tensors, write_npz
from hub_configs import SHAPES
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma2Config, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from sails_align.cli.doctor import ASSETS
from sails_align.core.errors import InputError
from sails_align.models.hooks import hidden_states_at
from sails_align.saes.checks import compare_names, layer_of_hook
from sails_align.saes.files import WEIGHTS, names_of
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource

D, F = 32, 64


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def jumprelu(hidden_TD: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The definition (arXiv 2407.14435, equation 3), without subtracting b_dec, as Gemma Scope has it."""
    pre_TF = hidden_TD.double() @ tensors["W_enc"].double() + tensors["b_enc"].double()
    return torch.where(pre_TF > tensors["threshold"].double(), pre_TF, 0.0)


def gemma2(d_model: int = D, layers: int = 26) -> Gemma2Config:
    return Gemma2Config(hidden_size=d_model, num_hidden_layers=layers)


def save_sae_lens(folder: Path, hook_name: str = "blocks.1.hook_resid_post", **overrides) -> None:
    """An SAE in sae-lens' own format."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = {"model_name": "gemma-2-2b", "hook_name": hook_name} | overrides.pop("metadata", {})
    torch.manual_seed(0)
    config = StandardSAEConfig(d_in=D, d_sae=F, metadata=SAEMetadata(**metadata), **overrides)
    StandardSAE(config).save_model(folder)


def load(path: Path, config=None, model_name: str = "google/gemma-2-2b", **options):
    source = SAESource(path=str(path), **options)
    return SAESet.load(source, model_config=config or gemma2(), model_name=model_name)


def load_release(release: str, sae_ids: list[str], config, model_name: str = "google/gemma-2-2b"):
    return SAESet.load(SAESource(release, tuple(sae_ids)), model_config=config, model_name=model_name)


# Releases, through SAE.from_pretrained


def test_gemma_scope_release_at_real_size(cache):
    tensors = sae_tensors(2304, 16384, torch.float16)
    add_gemma_scope(cache, "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82", tensors)
    saes = load_release("gemma-scope-2b-pt-res-canonical", ["layer_12/width_16k/canonical"], gemma2(2304))
    assert list(saes) == [12]
    info = saes[12].info
    assert (info.d_model, info.d_sae, info.architecture, info.model_name) == (2304, 16384, "jumprelu", "gemma-2-2b")
    assert info.source == "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical"
    assert saes[12].sae.cfg.metadata.prepend_bos
    assert len(info.sha256) == 64
    hidden_TD = (torch.randn(4, 2304) * 3).bfloat16()
    acts_TF = saes[12].encode(hidden_TD)
    expected_TF = jumprelu(hidden_TD, tensors)
    assert acts_TF.dtype == torch.float32
    assert 0 < (acts_TF > 0).float().mean() < 0.9
    torch.testing.assert_close(acts_TF.double(), expected_TF, atol=1e-4, rtol=1e-4)
    expected_TD = expected_TF @ tensors["W_dec"].double() + tensors["b_dec"].double()
    torch.testing.assert_close(saes[12].decode(acts_TF).double(), expected_TD, atol=1e-3, rtol=1e-4)


def test_llama_scope_folds_its_input_scaling(cache):
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    factor = get_norm_scaling_factor("llama_scope_lxr_8x", "l10r_8x")
    assert factor is not None
    tensors = sae_tensors(D, F)
    repo, folder = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L10R-8x"
    add_llama_scope(cache, repo, folder, tensors, scaling=factor, threshold=0.3)
    config = LlamaConfig(hidden_size=D, num_hidden_layers=32)
    saes = load_release("llama_scope_lxr_8x", ["l10r_8x"], config, "meta-llama/Llama-3.1-8B")
    sae = saes[10]
    hidden_TD = torch.randn(50, D) / factor
    scaled = tensors | {"threshold": torch.tensor(0.3 * factor)}  # sae-lens scales the threshold with the input
    expected_TF = jumprelu(hidden_TD * factor, scaled)
    acts_TF = sae.encode(hidden_TD)
    torch.testing.assert_close(acts_TF.double(), expected_TF, atol=1e-4, rtol=1e-4)
    expected_TD = (expected_TF @ tensors["W_dec"].double() + tensors["b_dec"].double()) / factor
    torch.testing.assert_close(sae.decode(acts_TF).double(), expected_TD, atol=1e-5, rtol=1e-4)
    assert sae.sae.cfg.normalize_activations == "none"
    torch.testing.assert_close(acts_TF @ sae.W_dec_FD, sae.decode(acts_TF) - sae.sae.b_dec)


def test_gemma_scope_2_works_offline(cache):
    """sae-lens' own loader asks the hub for the shapes of a cached file."""
    tensors = sae_tensors(D, F)
    repo = "google/gemma-scope-2-270m-pt"
    file = add_gemma_scope_2(cache, repo, "resid_post/layer_12_width_16k_l0_medium", tensors)
    config = Gemma3TextConfig(hidden_size=D, num_hidden_layers=18)
    sae_ids = ["layer_12_width_16k_l0_medium"]
    saes = load_release("gemma-scope-2-270m-pt-res", sae_ids, config, "google/gemma-3-270m")
    assert saes[12].info.model_name == "gemma-3-270m"
    hidden_TD = torch.randn(10, D) * 3
    torch.testing.assert_close(saes[12].encode(hidden_TD).double(), jumprelu(hidden_TD, tensors), atol=1e-4, rtol=1e-4)
    assert list(load(file, config, "google/gemma-3-270m")) == [12]


def test_gemma_scope_2_at_real_size(cache):
    tensors = sae_tensors(2560, 16384, torch.float16)
    add_gemma_scope_2(cache, "google/gemma-scope-2-4b-pt", "resid_post/layer_17_width_16k_l0_medium", tensors)
    sae_ids = ["layer_17_width_16k_l0_medium"]
    saes = load_release("gemma-scope-2-4b-pt-res", sae_ids, SHAPES["gemma-3-4b"], "google/gemma-3-4b-pt")
    info = saes[17].info
    assert (info.d_model, info.d_sae, info.hook_name) == (2560, 16384, "blocks.17.hook_resid_post")
    hidden_TD = (torch.randn(4, 2560) * 3).bfloat16()
    expected_TF = jumprelu(hidden_TD, tensors)
    torch.testing.assert_close(saes[17].encode(hidden_TD).double(), expected_TF, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("release", "sae_ids", "said"),
    [
        ("gemma-scope-2b-pt-res-canonical", ["layer_12/width_16k/canonical"], "not in the cache"),
        ("gemma-scope-2b-pt-re", ["x"], "did you mean 'gemma-scope-2b-pt-res'"),
        ("gemma-scope-2b-pt-res-canonical", ["layer_12/width_16k"], "did you mean 'layer_12/width_16k/canonical'"),
        ("llama_scope_lxr_8x", [], "needs --sae_ids"),
        ("qwen-scope-3-8b-base-w64k-l50", ["layer0"], "pickles"),
        ("somebody/unknown-saes", ["layer_3"], "not in the cache"),
    ],
)
def test_releases_that_cannot_be_had(cache, release, sae_ids, said):
    with pytest.raises(InputError, match=said) as error:
        load_release(release, sae_ids, gemma2())
    assert len(str(error.value).splitlines()) <= 3


def test_a_damaged_cached_file_is_named(cache):
    file = add_to_cache(cache, "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82/params.npz")
    file.write_bytes(b"not a zip file")
    with pytest.raises(InputError, match=r"layer_12/width_16k/canonical cannot be loaded"):
        load_release("gemma-scope-2b-pt-res-canonical", ["layer_12/width_16k/canonical"], gemma2())


@pytest.mark.parametrize("choice", [{}, {"release": "r", "path": "p"}])
def test_either_a_release_or_a_path(choice):
    with pytest.raises(InputError, match="both or neither"):
        names_of(SAESource(**choice))


# Local paths


def test_gemma_scope_files_of_several_layers(tmp_path):
    root = tmp_path / "gemma-scope-2b-pt-res"
    tensors = sae_tensors(D, F)
    for layer in (5, 12):
        write_npz(root / f"layer_{layer}/width_16k/average_l0_82/params.npz", tensors)
    saes = load(root)
    assert list(saes) == [5, 12]
    assert saes[5].info.model_name == "gemma-2-2b"
    hidden_TD = torch.randn(10, D) * 3
    torch.testing.assert_close(saes[5].encode(hidden_TD).double(), jumprelu(hidden_TD, tensors), atol=1e-4, rtol=1e-4)
    assert list(load(root, sae_ids=("layer_12",))) == [12]
    assert list(load(root / "layer_5/width_16k/average_l0_82/params.npz")) == [5]


@pytest.mark.parametrize("file", ["params.npz", "params.safetensors", WEIGHTS])
def test_local_saes_are_known_by_their_weights(tmp_path, file):
    """Else a subspace of other SAEs would be taken from the cache."""
    path = tmp_path / "layer_5" / file
    path.parent.mkdir()
    path.write_bytes(b"some weights")
    before = SAESource(path=str(tmp_path)).identity()
    path.write_bytes(b"other weights")
    assert SAESource(path=str(tmp_path)).identity() != before


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("some/params.npz", "cannot infer the layer of"),
        ("gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_1/params.npz", "not an SAE of the residual stream"),
    ],
)
def test_gemma_scope_files_refused(tmp_path, place, said):
    write_npz(tmp_path / place, sae_tensors(D, F))
    with pytest.raises(InputError, match=said):
        load(tmp_path)


def test_pickles_are_not_opened(tmp_path):
    file = tmp_path / "layer_3" / "params.npz"
    file.parent.mkdir()
    np.savez(file, w_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="cannot be loaded"):
        load(tmp_path)


def test_sae_lens_folders(tmp_path):
    save_sae_lens(tmp_path / "a", "blocks.1.hook_resid_post")
    save_sae_lens(tmp_path / "b", "blocks.3.hook_resid_post", dtype="bfloat16")
    saes = load(tmp_path)
    assert list(saes) == [1, 3]
    assert saes[3].encode(torch.randn(2, D).bfloat16()).dtype == torch.float32
    assert saes[3].W_dec_FD.dtype == torch.float32
    assert list(load(tmp_path / "a")) == [1]
    assert saes[1].info.sha256 != saes[3].info.sha256
    assert not any(parameter.requires_grad for parameter in saes[1].sae.parameters())


def test_two_saes_of_one_layer_are_refused(tmp_path):
    save_sae_lens(tmp_path / "post", "blocks.1.hook_resid_post")
    save_sae_lens(tmp_path / "pre", "blocks.2.hook_resid_pre")
    with pytest.raises(InputError, match="both SAEs of layer 1"):
        load(tmp_path)
    assert list(load(tmp_path, sae_ids=("pre",))) == [1]


def test_no_sae_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(InputError, match="no SAE at"):
            load(path)


@pytest.mark.parametrize("damage", ["weights", "config", "missing", "shape"])
def test_damaged_folders_are_named(tmp_path, damage):
    save_sae_lens(tmp_path)
    if damage == "weights":
        (tmp_path / "sae_weights.safetensors").write_bytes(b"\x00" * 100)
    elif damage == "config":
        (tmp_path / "cfg.json").write_text("{")
    elif damage == "missing":
        (tmp_path / "sae_weights.safetensors").unlink()
    else:
        config = json.loads((tmp_path / "cfg.json").read_text())
        (tmp_path / "cfg.json").write_text(json.dumps(config | {"d_sae": F + 1}))
    with pytest.raises(InputError, match="cannot be loaded") as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
    if damage == "shape":
        says = (
            rf"\w+ has shape \([\d, ]*{F}[\d, ]*\), but its cfg.json implies \([\d, ]*{F + 1}[\d, ]*\);\ncopy weights"
        )
        assert re.search(says, str(error.value))


def test_a_tensor_that_is_missing_is_named(tmp_path):
    save_sae_lens(tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    del weights["b_dec"]
    save_file(weights, tmp_path / "sae_weights.safetensors")
    with pytest.raises(InputError, match=r"cannot be loaded .*b_dec"):
        load(tmp_path)


def test_unfolded_input_scaling_is_refused(tmp_path):
    save_sae_lens(tmp_path, normalize_activations="expected_average_only_in")
    with pytest.raises(InputError, match="scaled by a constant"):
        load(tmp_path)


def test_scaling_of_each_token_is_done_by_sae_lens(tmp_path):
    save_sae_lens(tmp_path, normalize_activations="constant_norm_rescale")
    sae = load(tmp_path)[1]
    hidden_TD = torch.randn(5, D)
    acts_TF = sae.encode(hidden_TD)
    rebuilt_TD = sae.decode(acts_TF)
    torch.testing.assert_close(sae.encode(7 * hidden_TD), acts_TF)
    torch.testing.assert_close(sae.decode(acts_TF), 7 * rebuilt_TD)
    assert sae.sae.cfg.normalize_activations == "constant_norm_rescale"


def test_topk_decoder_norms_are_folded(tmp_path):
    """Such an SAE's activations are not in units of its stored decoder rows, so they would be misread."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(0)
    metadata = SAEMetadata(model_name="gemma-2-2b", hook_name="blocks.1.hook_resid_post")
    original = TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=4, rescale_acts_by_decoder_norm=True, metadata=metadata))
    original.W_dec.data *= torch.rand(F, 1) * 3 + 0.1
    original.save_model(tmp_path)
    sae = load(tmp_path)[1]
    hidden_TD = torch.randn(20, D)
    acts_TF = sae.encode(hidden_TD)
    assert ((acts_TF > 0).sum(1) <= 4).all()
    torch.testing.assert_close(sae.decode(acts_TF), original(hidden_TD).detach())
    torch.testing.assert_close(acts_TF @ sae.W_dec_FD + sae.sae.b_dec, original(hidden_TD).detach())
    wrong_TD = original.encode(hidden_TD) @ original.W_dec + original.b_dec
    assert not torch.allclose(wrong_TD, original(hidden_TD), atol=1e-2)


# Hook points


@given(st.integers(0, 99))
def test_layer_of_hook(block):
    for name in (f"blocks.{block}.hook_resid_post", f"model.layers.{block}", f"layers.{block}"):
        assert layer_of_hook(name) == block
    assert layer_of_hook(f"model.language_model.layers.{block}.output") == block
    assert layer_of_hook(f"blocks.{block}.hook_resid_pre") == layer_of_hook(f"model.layers.{block}.input") == block - 1
    for part in ("hook_resid_mid", "hook_mlp_out", "attn.hook_z", "hook_mlp_in", "hook_resid_post.x"):
        assert layer_of_hook(f"blocks.{block}.{part}") is None
    assert layer_of_hook(f"model.layers.{block}.self_attn.o_proj.input") is None
    assert layer_of_hook("hook_embed") is None


@pytest.mark.parametrize(
    ("hook_name", "metadata"),
    [
        ("blocks.0.hook_resid_pre", {}),
        ("blocks.1.hook_mlp_out", {}),
        ("blocks.1.hook_resid_mid", {}),
        ("", {}),
        ("blocks.1.hook_resid_post", {"hf_hook_name": "model.layers.2.output"}),
        ("blocks.1.hook_resid_post", {"hf_hook_name": "model.layers.1.self_attn.o_proj.input"}),
    ],
)
def test_hooks_that_are_not_a_blocks_output(tmp_path, hook_name, metadata):
    save_sae_lens(tmp_path, hook_name, metadata=metadata)
    with pytest.raises(InputError, match="not the output of a block"):
        load(tmp_path)


def test_resid_pre_is_the_output_of_the_block_before(tmp_path):
    save_sae_lens(tmp_path, "blocks.3.hook_resid_pre", metadata={"model_name": "tiny"})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=D, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, head_dim=16
    )
    model = LlamaForCausalLM(config).eval()
    (layer,) = load(tmp_path, model.config, "tiny")
    input_ids_BS = torch.randint(50, (2, 7))
    inputs = []
    model.model.layers[3].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(input_ids_BS)
    hidden_BSD = hidden_states_at(model, [layer], input_ids_BS, torch.ones_like(input_ids_BS))[layer]
    assert torch.equal(hidden_BSD, inputs[0])


# Does it fit the model?


def test_width_and_depth_must_fit(tmp_path):
    save_sae_lens(tmp_path, "blocks.5.hook_resid_post")
    with pytest.raises(InputError, match=r"gemma-2-2b, whose width is 32,\nbut google/gemma-2-9b has d_model 3584"):
        load(tmp_path, gemma2(3584), "google/gemma-2-9b", allow_mismatch=True)
    with pytest.raises(InputError, match=r"layer 5 of gemma-2-2b,\nbut .* only layers 0 to 4"):
        load(tmp_path, gemma2(layers=5), allow_mismatch=True)


def test_another_models_sae_is_refused(tmp_path, caplog):
    save_sae_lens(tmp_path)
    with pytest.raises(InputError, match="gemma-2-2b, but the model is google/gemma-2b"):
        load(tmp_path, model_name="google/gemma-2b")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, model_name="google/gemma-2b", allow_mismatch=True)
    assert "a mismatch was allowed" in caplog.text


def test_instruct_models_and_nameless_folders_are_taken_with_a_warning(tmp_path, caplog):
    save_sae_lens(tmp_path / "sae")
    (tmp_path / "my-finetune").mkdir()
    with caplog.at_level(logging.WARNING):
        load(tmp_path / "sae")
        assert not caplog.records
        load(tmp_path / "sae", model_name="google/gemma-2-2b-it")
        assert "a variant of that model" in caplog.text
        load(tmp_path / "sae", model_name=str(tmp_path / "my-finetune"))
        assert "could not be checked by name" in caplog.text


@pytest.mark.parametrize(
    ("sae_model", "model", "verdict"),
    [
        ("gemma-2-2b", "google/gemma-2-2b", "same"),
        ("gemma-2-2b", "/c/models--google--gemma-2-2b/snapshots/0123", "same"),
        ("google/gemma-3-1b-pt", "google/gemma-3-1b-pt", "same"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1", "same"),
        ("testbed:0", "testbed:0", "same"),
        ("Llama-3-8B", "meta-llama/Meta-Llama-3-8B", "same"),
        ("gemma-2-2b", "google/gemma-2-2b-it", "variant"),
        ("gemma-2-9b-it", "google/gemma-2-9b", "variant"),
        ("gemma-3-1b-pt", "google/gemma-3-1b-it", "variant"),
        ("gemma-2-2b", "me/gemma-2-2b-safe", "variant"),
        ("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.1", "variant"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "variant"),
        ("gemma-2-2b", "google/gemma-2-9b", "different"),
        ("gemma-2-2b", "google/gemma-2b", "different"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3-8B", "different"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.3", "different"),
        ("gemma-2-2b", "not/on/this/disk", "different"),
        (None, "google/gemma-2-2b", "unknown"),
    ],
)
def test_compare_names(sae_model, model, verdict):
    assert compare_names(sae_model, model) == verdict


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_weights_that_are_not_finite(tmp_path, name):
    shutil.copytree(ASSETS / "saes" / "layer_2", tmp_path / "layer_2")
    file = tmp_path / "layer_2" / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file)
    config = AutoConfig.from_pretrained(ASSETS / "model")
    with pytest.raises(InputError, match=f"has numbers in {name} that are not finite"):
        load(tmp_path, config, "testbed")
