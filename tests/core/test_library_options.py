import re
from dataclasses import fields
from typing import Any

import pytest
import yaml
from trl import DPOConfig, GRPOConfig, ModelConfig, ScriptArguments, SFTConfig

from sails_align.cli.train import GROUPS, TRAINER_OPTIONS
from sails_align.core.library_options import LibraryOptions
from sails_align.initializers.targets import SIDES
from sails_align.training import run as align
from sails_align.training.options import own_options
from sails_align.training.rlhf import options as rlhf
from sails_align.training.starts import DEFAULT_TARGETS

TRAINERS = {"sft": SFTConfig, "dpo": DPOConfig, "rlhf": GRPOConfig}


@pytest.mark.parametrize("method", TRAINERS)
def test_names_are_those_of_the_imported_class(method):
    assert set(TRAINER_OPTIONS[method].names()) == {field.name for field in fields(TRAINERS[method])}


def test_what_help_shows_of_other_packages_is_among_their_options():
    known = {field.name for of in (SFTConfig, DPOConfig, ModelConfig, ScriptArguments) for field in fields(of)}
    assert TRAINER_OPTIONS["rlhf"].shown.keys() <= set(TRAINER_OPTIONS["rlhf"].names())
    for method in ("sft", "dpo"):
        assert TRAINER_OPTIONS[method].shown.keys() <= known


SHOWN_DEFAULT = re.compile(r"Default: (.+?)(?:, on the testbed (.+))?\.$")
IN_WORDS = {
    *(
        "model_name_or_path",
        "attn_implementation",
        "dataset_name",
        "lora_target_modules",
        "learning_rate",
        "output_dir",
    ),
    *("bf16", "use_cpu"),  # by the machine
}


@pytest.mark.parametrize("on_testbed", [False, True])
@pytest.mark.parametrize("method", TRAINERS)
def test_defaults_that_help_shows_are_the_real_ones(method: Any, on_testbed: bool) -> None:
    """Most of them are TRL's; help shows them as text, since TRL takes seconds to import."""
    if method == "rlhf":
        plan: Any = rlhf.parse([])
        parts = [plan.training]
    else:
        plan = align.parse(method, [] if on_testbed else ["--model_name_or_path", "someone/model"])
        parts = [plan.training, plan.model, plan.script]
    real = {name: value for part in parts for name, value in vars(part).items()}
    shown = {name: SHOWN_DEFAULT.search(text) for name, text in TRAINER_OPTIONS[method].shown.items()}
    shown = {name: found for name, found in shown.items() if found and name in real and name not in IN_WORDS}
    assert len(shown) >= (9 if method == "rlhf" else 18)
    for name, found in shown.items():
        default = yaml.safe_load((on_testbed and found[2]) or found[1])
        # transformers makes a list of the services.
        assert real[name] == ([] if name == "report_to" and default == "none" else default), name


def test_modules_that_get_an_adapter_are_those_that_help_shows() -> None:
    text = TRAINER_OPTIONS["sft"].shown["lora_target_modules"]
    *others, last = DEFAULT_TARGETS
    assert f"Default: {', '.join(others)} and {last}, on the testbed all." in text
    assert set(align.parse("sft", []).model.lora_target_modules) == {path.rpartition(".")[2] for path in SIDES}


def test_help_groups_every_option_of_ours():
    ours = {field.name for of in own_options("dpo") for field in fields(of) if field.init}
    assert ours | TRAINER_OPTIONS["sft"].shown.keys() == {name for names in GROUPS.values() for name in names}


def test_a_library_that_keeps_its_sources_elsewhere_has_no_known_names():
    assert LibraryOptions(("trl/no/such_file.py", "trl/trainer/sft_config.py"), {}).names() == ()
    assert LibraryOptions(("no_such_package/file.py",), {}).names() == ()
