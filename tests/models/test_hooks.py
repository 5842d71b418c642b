"""Hidden states are those of the block asked for, deeper blocks do not run, and no hook stays behind."""

import pytest
import torch
from families import GEMMA3_MULTIMODAL, TEXT_CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GPT2Config

from sails_align.core.errors import InputError
from sails_align.models.hooks import capture, continued_from, decoder_layers, edited, hidden_states_at


def tiny(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(TEXT_CONFIGS[family]).eval()


def tokens(batch: int = 2, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BS = torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(1))
    return ids_BS, torch.ones_like(ids_BS)


def hooks_left(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in decoder_layers(model))


@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_layer_is_the_output_of_that_block(family: str) -> None:
    model = tiny(family)
    ids_BS, ones_BS = tokens()
    with torch.no_grad():
        reference = model(input_ids=ids_BS, attention_mask=ones_BS, output_hidden_states=True).hidden_states
    mine = hidden_states_at(model, [0, 1, 2], ids_BS, ones_BS)
    for layer in (0, 1):  # transformers' entry 0 is the embeddings
        assert torch.equal(mine[layer], reference[layer + 1])
        assert not torch.allclose(mine[layer], reference[layer])
    assert not torch.allclose(mine[2], reference[3])  # its last entry is after the final norm
    assert torch.allclose(model.get_decoder().norm(mine[2]), reference[3])


def test_gemma3_with_its_vision_tower() -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(GEMMA3_MULTIMODAL).eval()
    ids_BS, ones_BS = tokens()
    assert len(decoder_layers(model)) == 3
    with torch.no_grad():
        decoder = model.get_decoder()
        reference = decoder(input_ids=ids_BS, attention_mask=ones_BS, output_hidden_states=True).hidden_states
    assert torch.equal(hidden_states_at(model, [1], ids_BS, ones_BS)[1], reference[2])


def test_deeper_blocks_and_head_do_not_run() -> None:
    model = tiny("gemma2")
    ran = []
    for layer, block in enumerate(decoder_layers(model)):
        block.register_forward_pre_hook(lambda module, args, layer=layer: ran.append(layer))
    model.lm_head.register_forward_pre_hook(lambda module, args: ran.append("head"))
    hidden_states_at(model, [0, 1], *tokens())
    assert ran == [0, 1]


def test_capture_is_that_of_a_whole_forward() -> None:
    model = tiny("gemma2")
    ids_BS, ones_BS = tokens()
    with capture(model, [1]) as hidden_states:
        logits = model(input_ids=ids_BS, attention_mask=ones_BS).logits
    assert torch.equal(hidden_states[1], hidden_states_at(model, [1], ids_BS, ones_BS)[1])
    assert torch.equal(logits, model(input_ids=ids_BS, attention_mask=ones_BS).logits)
    assert hooks_left(model) == 0


@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_a_forward_that_begins_at_a_block_is_that_of_a_whole_one(family: str) -> None:
    model = tiny(family)
    ids_BS, ones_BS = tokens()
    ran: list[int] = []
    for index, block in enumerate(decoder_layers(model)):
        block.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
        block.mlp.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
    with torch.no_grad():
        with capture(model, [1]) as states, edited(model, {1: lambda hidden_BSD: 2 * hidden_BSD}):
            whole = model(input_ids=ids_BS, attention_mask=ones_BS).logits
        ran.clear()
        with continued_from(model, 1, 2 * states[1]):
            continued = model(input_ids=ids_BS, attention_mask=ones_BS).logits
    assert torch.equal(continued, whole)
    assert ran == [0, 1, 2, 2], "of the blocks before, only the calls are left"
    assert not any("forward" in vars(block) for block in decoder_layers(model))


def test_no_hook_stays_when_the_forward_fails() -> None:
    model = tiny("gemma2")
    ids_BS, ones_BS = tokens()
    with pytest.raises(IndexError):
        hidden_states_at(model, [1], ids_BS + 1000, ones_BS)
    assert hooks_left(model) == 0


def test_peft_model_and_the_base_inside_it() -> None:
    model = tiny("gemma2")
    before = hidden_states_at(model, [1], *tokens())[1]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(hidden_states_at(adapted, [1], *tokens())[1], before)
    assert torch.equal(hidden_states_at(adapted.get_base_model(), [1], *tokens())[1], before)


@pytest.mark.parametrize("layer", [-1, 3])
def test_layer_out_of_range(layer: int) -> None:
    model = tiny("gemma2")
    with pytest.raises(InputError, match=f"layer {layer} is out of range; choose 0 to 2"):
        hidden_states_at(model, [0, layer], *tokens())
    assert hooks_left(model) == 0


def test_unsupported_model_is_refused_with_what_was_found() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(InputError, match=r"transformer\.h"):
        decoder_layers(model)


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 9),
    padding=st.integers(1, 9),
    pad_id=st.integers(0, 63),
    family=st.sampled_from(["gemma2", "llama"]),
)
def test_right_padding_changes_no_real_token(length: int, padding: int, pad_id: int, family: str) -> None:
    model = tiny(family)
    ids_BS, ones_BS = tokens(2, length)
    padded_BS = torch.nn.functional.pad(ids_BS, (0, padding), value=pad_id)
    mask_BS = torch.nn.functional.pad(ones_BS, (0, padding))
    with_padding = hidden_states_at(model, [2], padded_BS, mask_BS)[2][:, :length]
    assert torch.allclose(with_padding, hidden_states_at(model, [2], ids_BS, ones_BS)[2], atol=1e-5)
