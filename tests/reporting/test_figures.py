"""Figures of differences, categories and learning rates: what is drawn, and where it ends."""

import itertools

import pytest
from made_results import outcome
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sails_align.evaluation.metrics import METRICS, Metric
from sails_align.experiments.summary import Mean
from sails_align.reporting import figures
from sails_align.reporting.drawing import LOOKS

SAFETY = METRICS["safety_rate_out_of_distribution"]


def marker_of(axes: Axes) -> Line2D:
    """The one marker of a panel with differences."""
    (found,) = (line for line in axes.lines if line.get_marker() not in ("None", "|", ""))
    return found


@pytest.mark.parametrize(
    ("mean", "metric", "filled", "better"),
    [
        (Mean(0.1, 0.05, 0.15, 5), SAFETY, True, True),
        (Mean(-0.1, -0.15, -0.05, 5), SAFETY, True, False),
        (Mean(-0.1, -0.15, -0.05, 5), METRICS["over_refusal_rate"], True, True),
        (Mean(0.1, -0.05, 0.25, 5), SAFETY, False, True),
        (Mean(0.1, None, None, 1), SAFETY, False, True),  # of one seed there is no interval
    ],
)
def test_a_difference_is_hollow_where_the_interval_holds_zero(
    drawn: list[Figure], mean: Mean, metric: Metric, filled: bool, better: bool
) -> None:
    figures.forest({"sft-sails": {metric.name: mean}}, {"sft-sails": "SFT-SAILS"}, "f", "t", [metric])
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["SFT-SAILS"]
    marker, look = marker_of(axes), LOOKS["sft-sails"]
    assert (marker.get_color(), marker.get_marker()) == (look.colour, look.marker)
    assert (marker.get_markerfacecolor() == look.colour) == filled
    assert list(marker.get_xdata()) == [100 * mean.value]
    (tint,) = axes.patches
    box = tint.get_extents().transformed(axes.transData.inverted())
    assert (box.x0 <= 100 * mean.value <= box.x1) == better  # the side that is tinted is the better one
    assert axes.get_xlabel() == ("better →" if metric.higher_is_better else "← better")


def test_a_marker_is_above_the_arms_of_its_interval(drawn: list[Figure]) -> None:
    figures.forest({"sft-sails": {SAFETY.name: Mean(0.1, 0.0, 0.2, 5)}}, {"sft-sails": "s"}, "f", "t", [SAFETY])
    (axes,) = drawn[0].axes
    (arms,) = axes.collections
    assert marker_of(axes).get_zorder() > arms.get_zorder()
    assert arms.get_alpha() < 1


def test_lines_of_one_method_in_many_worlds_look_like_the_method(drawn: list[Figure]) -> None:
    found = {world: {SAFETY.name: Mean(0.1, 0.0, 0.2, 5)} for world in ("testbed:1", "shared_harm=0")}
    figures.forest(found, {world: world for world in found}, "f", "t", [SAFETY], of="sft-lora")
    markers = [line.get_marker() for line in drawn[0].axes[0].lines if line.get_color() == LOOKS["sft-lora"].colour]
    assert markers.count(LOOKS["sft-lora"].marker) == 2


def test_what_has_no_number_is_not_drawn(drawn: list[Figure]) -> None:
    figures.forest({"k-16": {SAFETY.name: Mean(None, None, None, 0)}}, {"k-16": "k"}, "f", "t", [SAFETY])
    assert len(drawn[0].axes[0].lines) == 1


def test_bars_have_a_panel_for_each_run_with_numbers(drawn: list[Figure]) -> None:
    found = outcome()
    figures.bars(found.categories("ood"), found.rows, "n", "t", METRICS["over_refusal_rate"])
    panels = [axes.get_title() for axes in drawn[0].axes if axes.get_visible()]
    assert drawn[0].get_supxlabel() == "over-refusal (%), ← better"
    assert panels == ["base", "SFT-LoRA", "SFT-SAILS", "SFT-full"]


def test_the_chosen_learning_rate_is_marked(drawn: list[Figure]) -> None:
    found = outcome("sft-lora")
    figures.learning_rates(
        {run: tuning.merits for run, tuning in found.tuning.items()}, found.rows, "n", METRICS["refusal_rate"]
    )
    curve, mark = drawn[0].axes[0].lines
    assert list(curve.get_xdata()) == [1e-3, 1e-2]
    assert list(mark.get_xdata()) == [1e-3]
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == ["0.001", "0.01"]
    assert drawn[0].axes[0].get_ylabel() == "refusal rate (%), better →"


def test_an_axis_of_shares_ends_at_100(drawn: list[Figure]) -> None:
    figures.curves({SAFETY.name: {"sft-lora": [(16, Mean(1.0, None, None, 1)), (64, Mean(0.9, 0.8, 0.99, 3))]}},
                   {"sft-lora": "SFT-LoRA"}, [SAFETY])  # fmt: skip
    low, high = drawn[0].axes[0].get_ylim()
    assert high == 100
    assert 70 < low < 80


def test_titles_of_neighbouring_panels_do_not_overlap(drawn: list[Figure]) -> None:
    metrics = [METRICS[name] for name in (SAFETY.name, "safety_rate_in_distribution", "merit")]
    curve = [(16, Mean(0.5, 0.4, 0.6, 3)), (64, Mean(0.6, 0.5, 0.7, 3))]
    labels = {"sft-lora": "SFT-LoRA"}
    figures.curves({metric.name: dict.fromkeys(labels, curve) for metric in metrics}, labels, metrics)
    boxes = [axes.title.get_window_extent() for axes in drawn[0].axes]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
