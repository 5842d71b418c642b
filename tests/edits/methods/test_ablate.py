"""Directional ablation leaves nothing of a direction in the residual stream."""

import copy
from pathlib import Path

import pytest
import torch
from families import TEXT_CONFIGS
from family import Family, run, tensors
from transformers import AutoModelForCausalLM

from sails_align.edits.direction import Direction
from sails_align.edits.linears import WRITERS
from sails_align.edits.methods.ablate import Ablate
from sails_align.models.hooks import capture, decoder_layers
from sails_align.models.norms import norm_gain


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama"])
def test_hidden_states_have_no_part_of_the_direction(name: str, *, has_biases: bool) -> None:
    """Also with biases, and where a norm all but removes a coordinate."""
    torch.manual_seed(0)
    config = copy.deepcopy(TEXT_CONFIGS[name])
    config.attention_bias = config.mlp_bias = has_biases
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            torch.nn.init.uniform_(module.weight, 0.3, 0.7)
            module.weight.data[3] = 1e-4 - name.startswith("gemma")  # its gain is 1 + weight
    n_biases = 0
    for key, parameter in model.named_parameters():
        if key.endswith(("o_proj.bias", "down_proj.bias")):
            torch.nn.init.normal_(parameter)
            n_biases += 1
    assert n_biases > 0 or not has_biases
    blocks = decoder_layers(model)
    direction_D = torch.randn(model.config.get_text_config().hidden_size, dtype=torch.float64)
    direction_D /= direction_D.norm()
    gains = {}
    for i, block in enumerate(blocks):
        for path in WRITERS:
            gains[f"model.layers.{i}.{path}.weight"] = norm_gain(block, path, floored=False)
    change = Ablate(Direction(0, direction_D, {0: 1.0}, "made up"), gains)

    def left() -> list[float]:
        with torch.no_grad(), capture(model, range(len(blocks))) as states:
            model(input_ids=torch.arange(2, 18).view(2, 8))
        return [(states[layer] @ direction_D).abs().max().item() for layer in states]

    assert min(left()) > 1e-3
    weights = dict(model.named_parameters())
    changed = 0
    with torch.no_grad():
        for key, weight in weights.items():
            new = change.tensor(key, weight)
            if new is not None:
                weight.copy_(new)
                changed += 1
    assert changed == 2 * len(blocks) + 1 + n_biases
    assert max(left()) < 1e-6


def test_a_model_loses_the_direction_and_nothing_else(family: Family, tmp_path: Path) -> None:
    after = run(
        "ablate", family.aligned, tmp_path / "out", dataset_name="testbed", helpful_dataset_name="testbed", layer=1
    )
    before = tensors(family.aligned)
    for name, weight in before.items():
        rank = torch.linalg.matrix_rank((after[name] - weight).double(), rtol=1e-3) if weight.dim() == 2 else 0
        writes = name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight"))
        assert rank == (1 if writes else 0), name
    again = run(
        "ablate", tmp_path / "out", tmp_path / "again", dataset_name="testbed", helpful_dataset_name="testbed", layer=1
    )
    assert again.keys() == after.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(input_ids=torch.arange(4, 12)[None]).logits).all()
