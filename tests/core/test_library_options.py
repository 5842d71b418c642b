from dataclasses import fields

import pytest
from trl import DPOConfig, GRPOConfig, ModelConfig, ScriptArguments, SFTConfig

from sails_align.cli.train import GROUPS, TRAINER_OPTIONS
from sails_align.core.library_options import LibraryOptions
from sails_align.training.options import own_options

TRAINERS = {"sft": SFTConfig, "dpo": DPOConfig, "rlhf": GRPOConfig}


@pytest.mark.parametrize("method", TRAINERS)
def test_names_are_those_of_the_imported_class(method):
    assert set(TRAINER_OPTIONS[method].names()) == {field.name for field in fields(TRAINERS[method])}


def test_what_help_shows_of_other_packages_is_among_their_options():
    known = {field.name for of in (SFTConfig, DPOConfig, ModelConfig, ScriptArguments) for field in fields(of)}
    assert TRAINER_OPTIONS["rlhf"].shown.keys() <= set(TRAINER_OPTIONS["rlhf"].names())
    for method in ("sft", "dpo"):
        assert TRAINER_OPTIONS[method].shown.keys() <= known


def test_help_groups_every_option_of_ours():
    ours = {field.name for of in own_options("dpo") for field in fields(of) if field.init}
    assert ours | TRAINER_OPTIONS["sft"].shown.keys() == {name for names in GROUPS.values() for name in names}


def test_a_library_that_keeps_its_sources_elsewhere_has_no_known_names():
    assert LibraryOptions(("trl/no/such_file.py", "trl/trainer/sft_config.py"), {}).names() == ()
    assert LibraryOptions(("no_such_package/file.py",), {}).names() == ()
