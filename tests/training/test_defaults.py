"""Tests of the defaults that come with a model."""

from dataclasses import replace

import pytest

from sails_align.core.errors import InputError
from sails_align.smollm2 import HUB_ID, saes, weights
from sails_align.training import defaults
from sails_align.training.run import parse

LORA = ("--init", "default")


@pytest.fixture(autouse=True)
def _weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are not downloaded: what is tested is the plan."""
    monkeypatch.setattr(weights, "model_path", lambda name: "folder of the weights")


def test_a_model_of_the_package_brings_its_options_and_its_data() -> None:
    plan, testbed = defaults.resolved(parse("dpo", ["--model_name_or_path", "smollm2", *LORA]))
    assert testbed is None
    assert (plan.name, plan.model_name) == (HUB_ID, "folder of the weights")
    assert (plan.script.dataset_name, plan.data.helpful_dataset_name) == ("twins-refused", "twins-answered")
    assert (plan.model.lora_r, plan.training.learning_rate, plan.training.max_length) == (16, 1e-4, 128)
    assert plan.sails.sae_path is None, "plain LoRA needs no SAEs"


def test_what_is_given_goes_before_it() -> None:
    options = ["--model_name_or_path", "smollm2:wheel", "--dataset_name", "mine.jsonl", "--lora_r", "4", *LORA]
    plan, _ = defaults.resolved(parse("sft", options))
    assert (plan.script.dataset_name, plan.data.helpful_dataset_name) == ("mine.jsonl", None)
    assert plan.model.lora_r == 4


def test_without_the_repository_saes_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saes, "FOLDER", saes.FOLDER / "missing")
    plan = parse("sft", ["--model_name_or_path", "smollm2"])
    with pytest.raises(InputError, match="and give --sae_path"):
        defaults.resolved(plan)
    named, _ = defaults.resolved(replace(plan, sails=plan.sails.replaced(sae_path="mine")))
    assert named.sails.sae_path == "mine"


@pytest.mark.parametrize("model", ["other/model", "./smollm2", HUB_ID])
def test_other_models_have_none_of_it(model: str) -> None:
    plan, _ = defaults.resolved(parse("sft", ["--model_name_or_path", model, *LORA]))
    assert (plan.script.dataset_name, plan.name) == (None, model)
    assert plan.training.learning_rate == 2e-4
