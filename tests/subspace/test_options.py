"""Presets, choices, and options read from the command line and YAML."""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.options import all_but, to_json
from sails_align.initializers import INITIALIZERS
from sails_align.initializers.options import InitializerOptions
from sails_align.subspace.options import CHOICES, NOT_OF_SUBSPACE, PRESETS, DiscoveryOptions


def test_presets_give_the_same_options():
    """Each gives exactly the options that are otherwise None, so nothing is left without a value."""
    names = {option.name for option in fields(InitializerOptions) if option.init and option.default is None}
    from_elsewhere = {"init", "harmful_prompts", "adapter_path", "sae_release", "sae_ids", "sae_path", "subspace_path"}
    for preset in PRESETS.values():
        assert set(preset) == names - from_elsewhere


@pytest.mark.parametrize("preset", PRESETS)
def test_preset(preset):
    args = InitializerOptions(preset=preset)
    assert {name: getattr(args, name) for name in PRESETS[preset]} == PRESETS[preset]
    assert args.given == frozenset()


def test_paper_preset_is_the_papers():
    args = InitializerOptions(preset="paper")
    assert (args.tau, args.score, args.contrast, args.weighting, args.subspace_mode) == (
        0.8, "mean_diff", "response", False, "init"
    )  # fmt: skip


def test_given_options_go_before_the_preset():
    args = InitializerOptions(preset="paper", tau=0.5, weighting=True, top_k=PRESETS["paper"]["top_k"])
    assert (args.tau, args.weighting) == (0.5, True)
    assert args.given == {"tau", "weighting", "top_k"}, "an option is given even if its value is the preset's"
    assert args.score == PRESETS["paper"]["score"]


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    for value in CHOICES[name]:
        assert getattr(InitializerOptions(**{name: value}), name) == value
    with pytest.raises(InputError, match=rf"{name} is 'other', which is not one of: {CHOICES[name][0]}"):
        InitializerOptions(**{name: "other"})


def test_the_initializers_are_the_choices_of_init():
    for name in INITIALIZERS.names():
        assert InitializerOptions(init=name).init == name
    with pytest.raises(InputError, match="init is 'other', which is not one of: sails"):
        InitializerOptions(init="other")


def test_replaced_options_are_not_taken_for_given_ones():
    args = InitializerOptions(preset="paper", tau=0.5).replaced(init="sails", sae_path="here")
    assert (args.init, args.sae_path, args.tau) == ("sails", "here", 0.5)
    assert args.given == {"tau"}


@pytest.mark.parametrize(
    "bad",
    [
        {"tau": 0.0},
        {"tau": -0.1},
        {"tau": 1.01},
        {"tau": float("nan")},
        {"top_k": 0},
        {"max_discovery_examples": 0},
        {"init_scale": 0.0},
        {"init_scale": float("inf")},
        {"init": "default", "adapter_path": "somewhere"},
    ],
)
def test_values_out_of_range(bad: dict[str, Any]):
    with pytest.raises(InputError) as error:
        InitializerOptions(**bad)
    assert all(name in str(error.value) for name in bad)


def test_what_decides_the_subspace():
    """Its options are what differs between two subspaces, and those of the adapter are not among them."""
    base = InitializerOptions().subspace_options()
    assert InitializerOptions(tau=0.5).subspace_options() != base
    of_adapter: list[dict[str, Any]] = [{"layer_map": "sae_only"}, {"init_scale": 2.0}, {"subspace_mode": "freeze"}]
    for same in of_adapter:
        assert InitializerOptions(**same).subspace_options() == base


def test_each_option_of_discovery_decides_the_subspace_unless_it_is_named_with_a_reason():
    counted = set(
        """
        benign_whitening center contrast max_discovery_examples max_length prompt_tokens rank score seed tau top_k
        weighting
        """.split()  # noqa: SIM905
    )
    names = {option.name for option in fields(DiscoveryOptions)}
    assert counted | NOT_OF_SUBSPACE.keys() == names
    assert not counted & NOT_OF_SUBSPACE.keys()
    others: dict[str, Any] = {**PRESETS["paper"], "max_discovery_examples": 7, "max_length": 7, "rank": 7, "seed": 7}
    others |= {"contrast": "both", "score": "standardized", "top_k": 7}
    base = all_but(NOT_OF_SUBSPACE, DiscoveryOptions())
    for name in counted:
        assert all_but(NOT_OF_SUBSPACE, DiscoveryOptions(**{name: others[name]})) != base, name


def test_to_json_has_all_options_and_not_how_they_were_given():
    assert set(to_json(InitializerOptions())) == {option.name for option in fields(InitializerOptions)} - {"given"}


# The command line and YAML


@dataclass
class Options:
    count: int = field(default=1, metadata={"help": "A whole number."})
    share: float | None = field(default=None, metadata={"help": "A number."})
    flag: bool = field(default=True, metadata={"help": "Yes or no."})
    maybe: bool | None = field(default=None, metadata={"help": "Yes, no or neither."})
    name: str | None = field(default=None, metadata={"help": "Text."})
    items: list[int] | None = field(default=None, metadata={"help": "Whole numbers."})
    extra: dict[str, Any] | str | None = field(default=None, metadata={"help": "JSON."})


def parse(tmp_path: Path, text: str = "", *argv: str, **defaults: Any) -> Options:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    line = CommandLine.read([*argv, *(["--config", str(path)] if text else [])])
    return line.parse([Options], defaults=defaults)[0]


def test_command_line_before_file_before_defaults(tmp_path):
    parsed = parse(tmp_path, "count: 2\nname: file", "--count", "3", count=9, name="default", share=0.5)
    assert (parsed.count, parsed.name, parsed.share) == (3, "file", 0.5)


def test_config_may_be_written_with_an_equals_sign_and_anywhere(tmp_path):
    (tmp_path / "options.yaml").write_text("name: file")
    line = CommandLine.read(["--count", "3", f"--config={tmp_path / 'options.yaml'}", "--share", "1"])
    parsed = line.parse([Options])[0]
    assert (parsed.count, parsed.name, parsed.share) == (3, "file", 1.0)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("count: 2", "count", 2),
        ("count: '2'", "count", 2),
        ("share: 1", "share", 1.0),
        ("share: 1e-4", "share", 1e-4),  # which YAML takes for text
        ("share: null", "share", None),
        ("flag: false", "flag", False),
        ("flag: 'no'", "flag", False),
        ("maybe: true", "maybe", True),
        ("name: true", "name", "true"),  # such as resume_from_checkpoint
        ("name: 12", "name", "12"),
        ("items: [1, 2]", "items", [1, 2]),
        ("items: 1", "items", [1]),
        ("extra: {a: 1}", "extra", {"a": 1}),
    ],
)
def test_yaml_values(tmp_path, text, name, value):
    found = getattr(parse(tmp_path, text), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("count: 2.5", "count is 2.5, but it must be a whole number"),
        ("count: true", "count is True, but it must be a whole number"),
        ("count: null", "count is None, but it must be a whole number"),
        ("count: [1]", "must be a whole number"),
        ("share: much", "share is 'much', but it must be a number"),
        ("flag: 3", "flag is 3, but it must be true or false"),
        ("maybe: perhaps", "must be true or false"),
        ("items: [1, x]", "items is 'x', but it must be a whole number"),
        ("cuont: 1", "unknown option 'cuont'; did you mean --count?"),
        ("zzz: 1", "unknown option 'zzz'; remove it"),
        ("env: 3", "env is 3, but it must be a mapping"),
        ("[1]", "is not a YAML mapping"),
        ("1: 2", "is not a YAML mapping"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_yaml_values_that_cannot_be_used(tmp_path, text, said):
    with pytest.raises(InputError) as error:
        parse(tmp_path, text)
    assert said in str(error.value)
    assert "options.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--count", "x"], "--count: invalid int value: 'x'"),
        (["--cuont", "1"], "unknown option '--cuont' on the command line; did you mean --count?"),
        (["--cou", "1"], "unknown option '--cou'"),  # no abbreviations: a new option would change what they mean
        (["stray"], "unknown option 'stray'"),
        (["--count"], "--count: expected one argument"),
        (["--config"], "--config: expected one argument"),
        (["--config", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
    ],
)
def test_command_lines_that_cannot_be_used(tmp_path, argv, said):
    with pytest.raises(InputError) as error:
        parse(tmp_path, "", *argv)
    assert said in str(error.value)


def test_environment_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SAILS_TEST_VARIABLE", "before")
    parse(tmp_path, "env: {SAILS_TEST_VARIABLE: 3}")
    assert os.environ["SAILS_TEST_VARIABLE"] == "3"


def test_value_before_parsing(tmp_path):
    (tmp_path / "options.yaml").write_text("name: file\ncount: 3")
    line = CommandLine.read(["--config", str(tmp_path / "options.yaml"), "--share=1", "--name", "line"])
    assert [line.value(name) for name in ("name", "count", "share", "flag")] == ["line", "3", "1", None]
