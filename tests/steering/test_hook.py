"""Steering by a subspace: what each hook does to hidden states, what it refuses, and that nothing is left behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from sails_align.cli.evaluate import safety
from sails_align.core.errors import InputError
from sails_align.models.hooks import capture
from sails_align.steering import HOOKS, hook_of
from sails_align.steering.hook import steer
from sails_align.steering.options import SteeringOptions
from sails_align.subspace.basis import Subspace

D, IDS = 32, torch.arange(12).reshape(2, 6)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=D, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, head_dim=16
    )
    return AutoModelForCausalLM.from_config(config).eval()


def subspace(width: int = D, layers: tuple[int, ...] = (0, 1)) -> Subspace:
    torch.manual_seed(1)
    bases = {layer: torch.linalg.qr(torch.randn(width, 3)).Q for layer in layers}
    return Subspace(bases, {layer: torch.ones(3) for layer in bases}, {})


@torch.no_grad()
def hidden(model: Any) -> dict[int, torch.Tensor]:
    with capture(model, [0, 1, 2]) as found:
        model(IDS)
        return dict(found)


def test_ablation_leaves_nothing_of_the_subspace_in_any_of_its_layers(model: Any):
    given, before = subspace(), hidden(model)
    with steer(model, given, "ablate"):
        during = hidden(model)
    for layer, basis_DR in given.bases.items():
        torch.testing.assert_close(during[layer] @ basis_DR, torch.zeros(2, 6, 3), rtol=0, atol=1e-6)
        assert (before[layer] @ basis_DR).abs().max() > 1e-3
    rest_DR = torch.linalg.qr(torch.cat([given.bases[0], torch.randn(D, D - 3)], dim=1)).Q[:, 3:]
    torch.testing.assert_close(during[0] @ rest_DR, before[0] @ rest_DR)
    torch.testing.assert_close(hidden(model), before, rtol=0, atol=0)


def test_a_half_ablation_leaves_half(model: Any):
    basis_DR, before = subspace().bases[1], hidden(model)
    with steer(model, subspace(), "ablate", strength=0.5, layers=[1]):
        during = hidden(model)
    torch.testing.assert_close(during[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(during[1] @ basis_DR, before[1] @ basis_DR / 2)


def test_what_is_added_has_the_share_of_each_hidden_states_norm(model: Any):
    basis_DR, before = subspace().bases[1], hidden(model)
    with steer(model, subspace(), "add", strength=-0.4, layers=[1], direction=2):
        during = hidden(model)
    expected = -0.4 * before[1].norm(dim=-1, keepdim=True) * basis_DR[:, 2]
    torch.testing.assert_close(during[1] - before[1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(during[0], before[0], rtol=0, atol=0)
    assert not torch.allclose(during[2] - before[2], expected)  # block 2 read another input


def test_generation_and_adapters_are_steered_too(model: Any):
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    given = subspace(layers=(2,))

    def said() -> list[int]:
        mask = torch.ones_like(IDS)
        return adapted.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)[0, 6:].tolist()

    # So strong that the head hears nothing else: the word with the largest product with it is said for ever.
    loudest = int((model.lm_head.weight @ model.model.norm(given.bases[2][:, 0])).argmax())
    assert said() != [loudest] * 4
    with steer(adapted, given, "add", strength=1e6):
        assert said() == [loudest] * 4


def test_no_hook_stays_after_an_error(model: Any):
    before = hidden(model)
    with pytest.raises(RuntimeError, match="within"), steer(model, subspace(), "add"):
        raise RuntimeError("within")
    torch.testing.assert_close(hidden(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("how", HOOKS.names())
def test_strength_0_changes_nothing(model: Any, how: str):
    before = hidden(model)
    with steer(model, subspace(), how, strength=0.0):
        torch.testing.assert_close(hidden(model), before, rtol=0, atol=0)


def test_the_hook_of_an_evaluation_is_known_by_the_subspaces_content(tmp_path: Path):
    assert hook_of(SteeringOptions()) is None
    hooks: list[Any] = []
    for name in ("a", "b"):
        subspace().save(tmp_path / name, "hash")
        hooks.append(hook_of(SteeringOptions("add", str(tmp_path / name))))
    assert hooks[0].identity() == hooks[1].identity()
    other: Any = hook_of(SteeringOptions("add", str(tmp_path / "a"), steer_strength=0.3))
    assert other.identity() != hooks[0].identity()


@pytest.mark.parametrize(
    ("how", "options", "said"),
    [
        ("remove", {}, "there is no steering hook 'remove'"),
        ("add", {"layers": [2]}, "steer_layers has 2, which the subspace does not; choose of 0, 1"),
        ("add", {"direction": 3}, "steer_direction is 3, but a basis has 3; choose 0 to 2"),
        ("add", {"direction": -1}, "steer_direction is -1"),
        ("add", {"strength": float("nan")}, "steer_strength is nan"),
    ],
)
def test_what_cannot_be_done_is_refused(model: Any, how: str, options: dict[str, Any], said: str):
    with pytest.raises(InputError) as refused, steer(model, subspace(), how, **options):
        pass
    assert said in str(refused.value)


def test_a_subspace_of_another_model_is_refused(model: Any):
    with pytest.raises(InputError, match="has d_model 16, but the model has d_model 32"):
        steer(model, subspace(16), "ablate")
    with pytest.raises(InputError, match="layer 3 is out of range; choose 0 to 2"), steer(model, subspace(layers=(3,))):
        pass


def test_options_that_need_each_other():
    with pytest.raises(InputError, match="steer_subspace is not given"):
        SteeringOptions(steer="add")
    with pytest.raises(InputError, match="steer is not given"):
        SteeringOptions(steer_subspace="x")
    for ignored in ({"steer_strength": 0.5}, {"steer_layers": [3]}, {"steer_direction": 2}):
        with pytest.raises(InputError, match=f"{next(iter(ignored))} is given without steer; add --steer"):
            SteeringOptions(**ignored)
    with pytest.raises(InputError, match="`--steer ablate` removes all directions"):
        SteeringOptions(steer="ablate", steer_subspace="x", steer_direction=1)


def test_evaluations_take_the_options_and_other_backends_refuse_them(tmp_path: Path):
    subspace().save(tmp_path / "subspace", "hash")
    steering = ["--steer", "ablate", "--steer_subspace", str(tmp_path / "subspace")]
    options = ["--output_dir", str(tmp_path / "run"), "--backend", "vllm", *steering]
    with pytest.raises(InputError, match="a hook cannot be applied with backend 'vllm'"):
        safety(options)
    with pytest.raises(InputError, match="there is no steering hook 'abate'; did you mean 'ablate'"):
        safety([*options, "--steer", "abate"])
