"""What evaluations cannot do is found before the training that they would come after."""

from dataclasses import replace

import pytest
import torch
from hub_configs import CONFIGS, parse
from paths import ROOT

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.experiments.limits import Limits, weights_dtype
from sails_align.experiments.plan import option_groups, option_words
from sails_align.experiments.studies import read_plans
from sails_align.training import run as align
from sails_align.training.shapes import meta_model

MODEL = "gemma-2-2b"


def checked(run: str, monkeypatch: pytest.MonkeyPatch, *, on_gpu: bool = True, recipe: tuple[str, ...] = (), **changed):
    """Check the evaluations of a run of the shipped file, with other options of them or of its recipe."""
    monkeypatch.chdir(ROOT)
    line = CommandLine.read(["--config", f"recipes/configs/{MODEL}/compare.yaml"])
    plan = read_plans(line, None)[2][0].plans[0][1]
    assert plan.protocol is not None
    own = {f"--{name}": (value,) for name, value in changed.items() if value is not None}
    gone = {f"--{name}" for name, value in changed.items() if value is None}

    def options(kind: str, words: tuple[str, ...]) -> tuple[str, ...]:
        kept = {name: values for name, values in option_groups(words).items() if name not in gone}
        return option_words(kept | own) if kind == "safety" else words

    evaluate = tuple((part, kind, options(kind, words)) for part, kind, words in plan.protocol.evaluate)
    (of,) = (of for of in plan.runs if of.name == run)
    trainings = {} if of.trainer == "none" else {run: align.parse("sft", [*of.options, *recipe])}
    protocol = replace(plan.protocol, evaluate=evaluate)
    return Limits(protocol, trainings, lambda _: parse(CONFIGS[MODEL]), on_gpu, 1).check([of])


@pytest.mark.parametrize("run", ["base", "sft-lora", "sft-sails", "sft-full"])
def test_the_shipped_file_can_be_done(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked(run, monkeypatch) == 5


@pytest.mark.parametrize(
    ("changed", "recipe", "says"),
    [
        ({"dtype": None}, (), "is float32, and on GPUs vLLM computes adapters in 16 bits;\nadd dtype: bfloat16"),
        ({"dtype": "float32"}, (), "computes adapters in 16 bits"),
        ({"max_model_len": "9000"}, (), "max_model_len is 9000, but the model takes 8192 tokens"),
        ({"max_new_tokens": "8192"}, (), "max_new_tokens is 8192, which leaves no room"),
        ({"max_model_len": "512"}, (), "max_new_tokens is 512, which leaves no room"),
        ({"tensor_parallel_size": "2"}, (), "each evaluation gets 1 GPU"),
        ({"chat_template_path": "no/such.jinja"}, (), "no/such.jinja"),
        ({}, ("--lora_r", "1024"), "its rank is 1024, and vLLM takes at most 512"),
        ({}, ("--use_dora", "true"), "it is DoRA, which vLLM does not load"),
        ({}, ("--lora_target_modules", "q_proj", "embed_tokens"), "it adapts model.embed_tokens"),
        ({}, ("--max_length", "9000"), "max_length 9000, but google/gemma-2-2b takes 8192 tokens"),
    ],
)
def test_what_cannot_be_done(changed: dict, recipe: tuple, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as raised:
        checked("sft-lora", monkeypatch, recipe=recipe, **changed)
    assert says in str(raised.value)


def test_float32_is_no_obstacle_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked("sft-lora", monkeypatch, on_gpu=False, dtype=None) == 5
    assert checked("sft-full", monkeypatch, dtype=None) == 5
    assert checked("sft-lora", monkeypatch, dtype=None, backend="hf") == 5


def test_counting_a_model_leaves_its_type_as_the_hub_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = parse(CONFIGS[MODEL])
    meta_model(align.parse("sft", ["--config", f"recipes/configs/{MODEL}/sft_lora.yaml"]), config)  # in bfloat16
    assert weights_dtype("auto", config) == torch.float32
    assert weights_dtype("bfloat16", config) == torch.bfloat16
