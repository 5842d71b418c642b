"""Drawing: one look for each method, axes that end where their metric does, and the same file from the same numbers."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from made_results import outcome
from matplotlib.figure import Figure

from sails_align.core.registry import Registry
from sails_align.evaluation.metrics import METRICS
from sails_align.experiments.ablations import ABLATIONS
from sails_align.experiments.methods.entries import METHODS
from sails_align.experiments.plan import RUNS
from sails_align.experiments.tampering.defences import DEFENCES
from sails_align.reporting.drawing import (
    LOOKS,
    SAME_AS,
    SETTINGS,
    THEMES,
    axis_label,
    end_at_range,
    look_of,
    point,
)
from sails_align.reporting.trade_offs import trade_off


def test_a_picture_is_for_both_themes_and_the_same_each_time(tmp_path: Path) -> None:
    first, again = (trade_off(outcome().rows, ["sft-lora", "sft-sails"], "trade_off") for _ in range(2))
    assert (first, first.svg) == (again, again.svg)
    assert set(first.svg) == set(THEMES)
    assert first.svg["light"] != first.svg["dark"]
    first.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["trade_off.svg"]
    assert b"<svg" in (tmp_path / "trade_off.svg").read_bytes()


def test_known_methods_can_be_told_apart_by_marker_alone() -> None:
    markers = [look.marker for look in LOOKS.values()]
    assert len(set(markers)) == len(markers)
    assert set(RUNS) <= set(LOOKS)


def test_a_look_depends_on_the_name_alone() -> None:
    for name in ("sft-sails", "my-method", "lox"):
        assert look_of(name) == look_of(name)
    assert look_of("basis-random-features") == look_of("sft-random-features")
    assert look_of("lora-last-blocks") == look_of("sft-lora-blocks")


def test_no_other_method_looks_like_a_known_one() -> None:
    taken = {(look.colour, look.marker) for look in LOOKS.values()}
    others = [*(set(METHODS.names()) - set(LOOKS)), *(f"method-{i}" for i in range(200))]
    assert not taken & {(look.colour, look.marker) for look in map(look_of, others)}


@pytest.mark.parametrize("registry", [METHODS, DEFENCES], ids=["methods", "defences"])
def test_no_two_methods_of_a_study_look_alike(registry: Registry[Any]) -> None:
    looks = {name: look_of(name) for name in registry.names()}
    by_pair: dict[tuple[str, str], list[str]] = {}
    for name, look in looks.items():
        by_pair.setdefault((look.colour, look.marker), []).append(name)
    assert not [names for names in by_pair.values() if len(names) > 1]


def test_plain_lora_looks_the_same_as_a_method_and_as_a_defence() -> None:
    assert look_of("lora") == look_of("sft-lora")


def test_ablations_are_methods_of_the_main_study_or_settings() -> None:
    names = set(ABLATIONS.names())
    assert set(SAME_AS) <= names | set(DEFENCES.names())
    assert not (names | set(METHODS.names()) | set(LOOKS)) & (set(SAME_AS) - names)
    assert names - set(SAME_AS) == SETTINGS


@pytest.mark.parametrize(("name", "words"), [("safety_rate", "better →"), ("over_refusal_rate", "← better")])
def test_an_axis_says_which_direction_is_better(name: str, words: str) -> None:
    assert axis_label(METRICS[name]) == f"{METRICS[name].heading}, {words}"


@pytest.mark.parametrize(("name", "highest"), [("safety_rate", 100), ("harmfulness", 5), ("train_seconds", None)])
def test_an_axis_ends_where_the_range_of_its_metric_does(name: str, highest: float | None) -> None:
    metric = METRICS[name]
    for axis in ("x", "y"):
        axes = Figure().subplots()
        top = metric.scale * (metric.span[1] if highest else 7.0)
        axes.plot([top / 2, top], [top / 2, top])
        before = axes.get_xlim() if axis == "x" else axes.get_ylim()
        assert before[1] > top
        end_at_range(axes, metric, axis)
        assert (axes.get_xlim() if axis == "x" else axes.get_ylim()) == (before[0], highest or before[1])


def test_a_marker_at_the_end_of_an_axis_is_whole() -> None:
    axes = Figure().subplots()
    point(axes, LOOKS["sft-sails"], 100, 100, x_arms=[[1.0], [0.0]])
    assert not any(artist.get_clip_on() for artist in itertools.chain(axes.lines[-1:], axes.collections))
