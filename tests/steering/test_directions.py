"""Steering changes the output of the block it names, in training and generation alike, and leaves nothing behind."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from sails_align.core.errors import InputError
from sails_align.models.hooks import capture
from sails_align.steering.directions import added, removed

IDS = torch.arange(12).reshape(2, 6)
D = 32


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=D, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, head_dim=16
    )
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def outputs(model) -> dict[int, torch.Tensor]:
    """Hidden states of each block, of which the last hook's is what the next block reads."""
    with capture(model, [0, 1, 2]) as hidden:
        logits = model(IDS).logits
        return {**hidden, 3: logits}


def test_a_direction_is_added_to_one_block_at_every_token(model):
    before, direction_D = outputs(model), torch.randn(D)
    with added(model, {1: direction_D}):
        during = outputs(model)
    torch.testing.assert_close(during[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(during[1] - before[1], direction_D.expand(2, 6, D))
    assert not torch.allclose(during[2] - before[2], direction_D.expand(2, 6, D))  # block 2 read another input
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)


def test_a_subspace_is_taken_out_and_the_rest_stays(model):
    basis_DR = torch.linalg.qr(torch.randn(D, 3)).Q
    before = outputs(model)
    with removed(model, {1: basis_DR}):
        during = outputs(model)
    torch.testing.assert_close(during[1] @ basis_DR, torch.zeros(2, 6, 3), rtol=0, atol=1e-6)
    rest_DR = torch.linalg.qr(torch.cat([basis_DR, torch.randn(D, D - 3)], dim=1)).Q[:, 3:]
    torch.testing.assert_close(during[1] @ rest_DR, before[1] @ rest_DR)
    assert (before[1] @ basis_DR).abs().max() > 1e-3
    assert not torch.allclose(during[3], before[3])


def test_generation_and_adapters_are_steered_too(model):
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    torch.manual_seed(1)
    # Large enough that the head hears nothing else: the word with the largest product with it is said for ever.
    direction_D = 1e4 * torch.randn(D)

    def said() -> list[int]:
        mask = torch.ones_like(IDS)
        return adapted.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)[0, 6:].tolist()

    normed_D = model.model.norm(direction_D)
    loudest = int((model.lm_head.weight @ normed_D).argmax())
    assert said() != [loudest] * 4
    with added(adapted, {2: direction_D}):
        assert said() == [loudest] * 4


def test_no_hook_stays_after_an_error(model):
    before = outputs(model)
    with pytest.raises(RuntimeError, match="within"), added(model, {0: torch.ones(D)}):
        raise RuntimeError("within")
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape", "said"),
    [
        (3, (D,), "layer 3 is out of range; choose 0 to 2"),
        (-1, (D,), "layer -1 is out of range"),
        (0, (D + 1,), r"has shape \(33,\), but the model has d_model 32"),
        (0, (D, 2), r"has shape \(32, 2\)"),
    ],
)
def test_what_does_not_fit(model, layer, shape, said):
    with pytest.raises(InputError, match=said), added(model, {layer: torch.ones(shape)}):
        pass


def test_a_basis_that_does_not_fit(model):
    with pytest.raises(InputError, match=r"has shape \(32,\)"), removed(model, {0: torch.ones(D)}):
        pass
