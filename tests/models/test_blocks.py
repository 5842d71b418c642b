"""A model that is run block by block sees what it sees when it is run as a whole."""

import pytest
import torch
from families import N_LAYERS, TEXT_CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM

from sails_align.models.blocks import BlockByBlock
from sails_align.models.hooks import decoder_layers
from sails_align.models.inputs import watched_inputs

PATHS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(64, (2, 7), generator=generator)
    attention_BS = torch.ones_like(ids_BS)
    attention_BS[1, 4:] = 0
    mask_BS = torch.rand(2, 7, generator=generator) < 0.5
    return ids_BS, attention_BS, mask_BS & (attention_BS == 1)


def inputs_block_by_block(model: torch.nn.Module, change=None) -> dict[str, list[Tensor]]:
    runner, seen = BlockByBlock(model, [batch(0), batch(1)]), {}
    while runner.block < runner.n_blocks:
        name = f"{runner.block}."
        runner.watch(PATHS, lambda path, x_TI, name=name: seen.setdefault(name + path, []).append(x_TI))
        if change is not None:
            change(decoder_layers(model)[runner.block])
        runner.advance()
    return seen


def inputs_of_whole_model(model: torch.nn.Module) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {}
    modules = [f"model.layers.{block}.{path}" for block in range(N_LAYERS) for path in PATHS]
    for ids_BS, attention_BS, mask_BS in (batch(0), batch(1)):

        def keep(name: str, x_BSI: Tensor, mask_BS: Tensor = mask_BS) -> None:
            seen.setdefault(name.removeprefix("model.layers."), []).append(x_BSI[mask_BS])

        with watched_inputs(model, modules, keep), torch.no_grad():
            model(input_ids=ids_BS, attention_mask=attention_BS)
    return seen


@pytest.mark.parametrize("name", list(TEXT_CONFIGS))
def test_the_inputs_are_those_of_the_whole_model(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TEXT_CONFIGS[name]).double().eval()
    found, expected = inputs_block_by_block(model), inputs_of_whole_model(model)
    assert found.keys() == expected.keys()
    for place, inputs in expected.items():
        for one, other in zip(found[place], inputs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_inputs_after_a_changed_block_are_those_of_the_changed_model() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TEXT_CONFIGS["gemma2"]).double().eval()
    before = inputs_of_whole_model(model)

    def change(block: torch.nn.Module) -> None:
        with torch.no_grad():
            block.get_submodule("mlp.down_proj").weight.mul_(2)
            block.get_submodule("self_attn.v_proj").weight.mul_(-1)

    found, after = inputs_block_by_block(model, change), inputs_of_whole_model(model)
    torch.testing.assert_close(found["0.self_attn.o_proj"], before["0.self_attn.o_proj"], atol=1e-10, rtol=0)
    torch.testing.assert_close(found["2.self_attn.q_proj"], after["2.self_attn.q_proj"], atol=1e-10, rtol=0)
    assert (after["2.self_attn.q_proj"][0] - before["2.self_attn.q_proj"][0]).abs().max() > 1e-3
