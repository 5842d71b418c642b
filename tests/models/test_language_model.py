"""Of a multimodal model the decoder and the head are trained, and nothing else; of a language model everything is."""

import pytest
import torch
from families import GEMMA3_MULTIMODAL, TEXT_CONFIGS
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from sails_align.models.language_model import freeze_outside_decoder, outside_decoder


def multimodal() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GEMMA3_MULTIMODAL)


def adapted(model: PreTrainedModel, **options: object) -> set[str]:
    peft_model = get_peft_model(model, LoraConfig(r=2, **options))  # pyright: ignore[reportArgumentType]
    return {n.removeprefix("base_model.model.") for n, m in peft_model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r".*(q_proj|fc1)"])
def test_adapters_are_in_the_decoder_alone(targets: list[str] | str) -> None:
    model = multimodal()
    names = adapted(model, target_modules=targets, exclude_modules=outside_decoder(model))
    assert names
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert any("vision_tower" in name for name in adapted(multimodal(), target_modules=targets))  # the control


def test_the_head_may_have_one() -> None:
    model = multimodal()
    assert adapted(model, target_modules=["lm_head"], exclude_modules=outside_decoder(model)) == {"lm_head"}


def test_what_is_trained_is_what_gets_a_gradient() -> None:
    model = multimodal()
    freeze_outside_decoder(model)
    ids_BS = torch.arange(1, 9)[None]
    model(input_ids=ids_BS, labels=ids_BS).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[1] for name in trained} == {"language_model"}
    assert {name.split(".")[1] for name, _ in model.named_parameters()} > {"vision_tower", "multi_modal_projector"}


@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_a_language_model_is_trained_whole(family: str) -> None:
    model = AutoModelForCausalLM.from_config(TEXT_CONFIGS[family])
    assert outside_decoder(model) is None
    freeze_outside_decoder(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
