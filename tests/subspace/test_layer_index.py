"""An SAE of layer l reads the output of block l, and adapters take the layer that their modules touch.

Against the residual stream computed by hand (`reference_decoder`), from the files that a hub repository has: nothing
of our hooks, and nothing of transformers' models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_cache import (
    COMMIT,
    D_MODEL,
    D_SAE,
    add_gemma_scope,
    add_gemma_scope_2,
    add_llama_scope,
    add_model,
    add_to_cache,
    narrow,
    sae_tensors,
)
from hub_configs import CONFIGS
from peft import LoraConfig, get_peft_model
from reference_decoder import residual_stream, rms_norm
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from sails_align.data.tokens import TokenizedSide
from sails_align.initializers.adapter import initialize
from sails_align.models.hooks import decoder_layers
from sails_align.models.language_model import outside_decoder
from sails_align.models.load import exact_attention, load_truncated
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource
from sails_align.subspace.basis import Subspace
from sails_align.subspace.forward import discover
from sails_align.subspace.selection import FeatureFitter

N_LAYERS, LAYERS = 8, (1, 4, 5)  # of Gemma 3 the sixth block, 5, is the one without a sliding window
SMALL = {"num_hidden_layers": N_LAYERS, "sliding_window": 4, "attn_logit_softcapping": 2.0}
IDS = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(3))
THRESHOLD = 0.3


@dataclass(frozen=True)
class Family:
    """A model of a family in the hub's cache, its residual stream by hand, and SAEs of it in their own format."""

    repo_id: str
    folder: Path
    streams: list[list[Tensor]]
    """Of each sequence of `IDS`: the embeddings, and the output of each block."""
    release: str
    sae_ids: list[str]
    saes: Path
    """The SAEs' repository in the cache."""

    def output(self, sequence: int, layer: int) -> Tensor:
        """(S, D) of block `layer`; layer -1 are the embeddings."""
        return self.streams[sequence][layer + 1]


def small(config: dict[str, Any]) -> dict[str, Any]:
    """Few blocks; a window and a cap that matter, where the family has them."""
    if "text_config" in config:
        return config | {"text_config": small(config["text_config"])}
    return config | {name: value for name, value in SMALL.items() if name in config}


GEMMA3 = CONFIGS["gemma-3-4b"]
MODELS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "gemma2": (
        "google/gemma-2-2b",
        CONFIGS["gemma-2-2b"],
        "gemma-scope-2b-pt-res-canonical",
        "layer_{}/width_16k/canonical",
    ),
    "gemma3": (
        "google/gemma-3-1b-pt",
        GEMMA3["text_config"] | {"architectures": ["Gemma3ForCausalLM"], "hidden_size": 1152},
        "gemma-scope-2-1b-pt-res-all",
        "layer_{}_width_16k_l0_small",
    ),
    "gemma3_multimodal": (
        "google/gemma-3-4b-pt",
        GEMMA3,
        "gemma-scope-2-4b-pt-res-all",
        "layer_{}_width_16k_l0_small",
    ),
    "llama": ("meta-llama/Llama-3.1-8B", CONFIGS["llama-3.1-8b"], "llama_scope_lxr_8x", "l{}r_8x"),
}


@pytest.fixture(params=MODELS)
def family(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor, get_pretrained_saes_directory

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo_id, whole, release, pattern = MODELS[request.param]
    config = small(narrow(whole))
    add_model(tmp_path, repo_id, config)
    folder = add_to_cache(tmp_path, repo_id, "config.json").parent
    assert folder.name == COMMIT
    tensors = {
        name.rpartition("model.")[2]: tensor
        for file in folder.glob("model-*.safetensors")
        for name, tensor in load_file(file).items()
        if "vision" not in name
    }
    streams = [residual_stream(config.get("text_config", config), tensors, ids_S) for ids_S in IDS]
    found = get_pretrained_saes_directory()[release]
    sae_ids = [pattern.format(layer) for layer in LAYERS]
    for layer, sae_id in zip(LAYERS, sae_ids, strict=True):
        place = (tmp_path, found.repo_id, found.saes_map[sae_id], sae_tensors(seed=layer))
        if "llama" in request.param:
            scaling = get_norm_scaling_factor(release, sae_id)
            assert scaling is not None
            add_llama_scope(*place, scaling=scaling, threshold=THRESHOLD)
        elif "gemma3" in request.param:
            add_gemma_scope_2(*place)
        else:
            add_gemma_scope(*place)
    saes = add_to_cache(tmp_path, found.repo_id, "README.md").parent
    return Family(repo_id, folder, streams, release, sae_ids, saes)


def activations(family: Family, layer: int, hidden_TD: Tensor) -> Tensor:
    """By the definition of a JumpReLU SAE (arXiv 2407.14435, equation 3); Llama Scope's has scaled inputs."""
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    tensors = {name: tensor.double() for name, tensor in sae_tensors(seed=layer).items()}
    factor, threshold = 1.0, tensors["threshold"]
    if "llama" in family.release:
        sae_id = family.sae_ids[LAYERS.index(layer)]
        factor = get_norm_scaling_factor(family.release, sae_id)
        assert factor is not None
        threshold = torch.full((D_SAE,), THRESHOLD * factor)
    before_TF = factor * hidden_TD @ tensors["W_enc"] + tensors["b_enc"]
    return torch.where(before_TF > threshold, before_TF, 0.0)


def test_what_discovery_averages_is_the_output_of_that_block(family: Family) -> None:
    config = AutoConfig.from_pretrained(family.repo_id)
    # sae-lens' loader of releases takes the shapes of Gemma Scope from its names; ours of paths reads them.
    release = SAESource(family.release, tuple(family.sae_ids))
    source = SAESource(path=str(family.saes)) if "2b" in family.release else release
    saes = SAESet.load(source, model_config=config, model_name=family.repo_id)
    assert list(saes) == list(LAYERS)
    sequences = [TokenizedSide(ids_S.tolist(), [False] + [True] * (len(ids_S) - 1)) for ids_S in IDS]
    fitter = FeatureFitter(saes)
    model = load_truncated(family.repo_id, max(LAYERS), dtype=torch.float32)
    sides = {"aligned": sequences[:1], "unaligned": sequences[1:]}
    discover(model, {"response": sides}, [fitter], list(LAYERS))
    for layer in LAYERS:
        for sequence, found in enumerate(fitter.result().pair("response", layer)):
            by_hand = {
                at: activations(family, layer, family.output(sequence, at)[1:]).mean(0)
                for at in (layer - 1, layer, layer + 1)
            }
            torch.testing.assert_close(found.mean, by_hand.pop(layer), atol=1e-3, rtol=1e-3)
            assert all((found.mean - other).abs().max() > 0.1 for other in by_hand.values())


def test_modules_touch_the_layers_whose_directions_they_take(family: Family) -> None:
    """Readers of block l get the output of block l - 1, normed; writers add to the output of block l."""
    config = AutoConfig.from_pretrained(family.repo_id)
    base = AutoModelForCausalLM.from_pretrained(
        family.repo_id, dtype=torch.float32, attn_implementation=exact_attention(config)
    )
    options: Mapping[str, Any] = {"target_modules": ["q_proj", "o_proj"], "exclude_modules": outside_decoder(base)}
    model = get_peft_model(base, LoraConfig(r=2, **options)).eval()
    bases = {layer: torch.eye(D_MODEL)[:, 2 * layer : 2 * layer + 2] for layer in range(N_LAYERS)}
    subspace = Subspace(bases, {layer: torch.ones(2) for layer in bases}, provenance={})
    initialize(model, subspace)
    read: list[Tensor] = []
    gains = []
    for index, block in enumerate(decoder_layers(model)):
        q_proj, o_proj = (block.get_submodule(f"self_attn.{name}") for name in ("q_proj", "o_proj"))
        q_A, o_B = (part.default.weight for part in (q_proj.lora_A, o_proj.lora_B))  # pyright: ignore
        assert torch.equal(q_A.T, bases[max(index - 1, 0)]), "block 0 reads the embeddings: it takes the nearest layer"
        assert torch.equal(o_B, bases[index])
        q_proj.register_forward_pre_hook(lambda module, args: read.append(args[0][0].double()))
        weight = block.get_submodule("input_layernorm").get_parameter("weight").detach().double()
        gains.append(weight if "llama" in family.release else 1 + weight)
    with torch.no_grad():
        model(input_ids=IDS[:1])
    for index, (read_SD, gain_D) in enumerate(zip(read, gains, strict=True)):
        torch.testing.assert_close(read_SD, rms_norm(family.output(0, index - 1), gain_D), atol=1e-3, rtol=1e-3)
        assert (read_SD - rms_norm(family.output(0, index), gain_D)).abs().max() > 0.1
