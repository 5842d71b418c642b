"""Figures: what is drawn, in which colour, and that the same numbers give the same file."""

import itertools
from pathlib import Path

import pytest
from made_results import outcome
from matplotlib.figure import Figure

from sails_align.evaluation.metrics import METRICS
from sails_align.experiments.summary import Mean
from sails_align.reporting import figures
from sails_align.reporting.figures import THEMES, Picture

SAFETY = METRICS["safety_rate_out_of_distribution"]
GREY, GREEN, ORANGE = "#7F7F7F", "#009E73", "#D55E00"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures, in place of their files."""
    kept: list[Figure] = []

    def keep(name: str, title: str, size: tuple[float, float], draw) -> Picture:
        figure = Figure(figsize=size)
        draw(figure)
        kept.append(figure)
        return Picture(name, title, {}, b"")

    monkeypatch.setattr(figures, "picture", keep)
    return kept


def test_a_picture_is_for_both_themes_and_the_same_each_time(tmp_path: Path) -> None:
    first, again = (figures.trade_off(outcome().rows) for _ in range(2))
    assert first == again
    assert set(first.svg) == set(THEMES)
    assert first.svg["light"] != first.svg["dark"]
    first.write(tmp_path)
    assert (tmp_path / "trade_off.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "trade_off.svg").read_bytes()


def test_titles_say_what_is_shown() -> None:
    title = figures.trade_off(outcome().rows).title
    assert title.startswith("Safety rate, held-out categories against correct answers")


def test_the_front_joins_runs_that_no_other_beats() -> None:
    rows = outcome(levels={"sft-full": 0.5}).rows
    across, up = METRICS["over_refusal_rate"], SAFETY
    points = figures.pareto_front(rows, across, up)
    best = next(row for row in rows if row.run.name == "sft-sails").means
    assert points == [(best[across.name].value, best[up.name].value)]  # all refuse as much, and SAILS is safest


@pytest.mark.parametrize(
    ("mean", "metric", "colour"),
    [
        (Mean(0.1, 0.05, 0.15, 5), SAFETY, GREEN),
        (Mean(-0.1, -0.15, -0.05, 5), SAFETY, ORANGE),
        (Mean(-0.1, -0.15, -0.05, 5), METRICS["over_refusal_rate"], GREEN),
        (Mean(0.1, -0.05, 0.25, 5), SAFETY, GREY),
        (Mean(0.1, None, None, 1), SAFETY, GREY),  # of one seed there is no interval
    ],
)
def test_a_difference_is_grey_where_the_interval_holds_zero(drawn: list[Figure], mean, metric, colour: str) -> None:
    figures.forest({"k-16": {metric.name: mean}}, {"k-16": "k: 16"}, "f", "t", [metric])
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["k: 16"]
    point = axes.lines[1]  # the first is the line at 0
    assert point.get_color() == colour
    assert list(point.get_xdata()) == [100 * mean.value]


def test_what_has_no_number_is_not_drawn(drawn: list[Figure]) -> None:
    figures.forest({"k-16": {SAFETY.name: Mean(None, None, None, 0)}}, {"k-16": "k"}, "f", "t", [SAFETY])
    assert len(drawn[0].axes[0].lines) == 1


def test_bars_have_a_panel_for_each_run_with_numbers(drawn: list[Figure]) -> None:
    found = outcome()
    figures.bars(found.categories("ood"), found.rows, "n", "t", "%")
    panels = [axes.get_title() for axes in drawn[0].axes if axes.get_visible()]
    assert panels == ["base", "SFT-LoRA", "SFT-SAILS", "SFT-full"]


def test_the_chosen_learning_rate_is_marked(drawn: list[Figure]) -> None:
    found = outcome("sft-lora")
    figures.learning_rates({run: tuning.merits for run, tuning in found.tuning.items()}, found.rows)
    curve, mark = drawn[0].axes[0].lines
    assert list(curve.get_xdata()) == [1e-3, 1e-2]
    assert list(mark.get_xdata()) == [1e-3]


def test_titles_of_neighbouring_panels_do_not_overlap(drawn: list[Figure]) -> None:
    metrics = [METRICS[name] for name in (SAFETY.name, "safety_rate_in_distribution", "correct_answer_rate", "merit")]
    curve = [(16, Mean(0.5, 0.4, 0.6, 3)), (64, Mean(0.6, 0.5, 0.7, 3))]
    labels = {"sft-lora": "SFT-LoRA"}
    figures.curves({metric.name: dict.fromkeys(labels, curve) for metric in metrics}, labels, metrics)
    boxes = [axes.title.get_window_extent() for axes in drawn[0].axes]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
