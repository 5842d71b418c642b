"""Safety against helpfulness: which methods a figure has, and the Pareto front."""

from made_results import outcome
from matplotlib.figure import Figure

from sails_align.evaluation.metrics import METRICS
from sails_align.experiments.plan import RUNS
from sails_align.experiments.summary import SummaryRow
from sails_align.reporting import trade_offs

SAFETY, REFUSAL = METRICS["safety_rate_out_of_distribution"], METRICS["over_refusal_rate"]


def test_sft_and_dpo_have_figures_of_their_own_with_the_reference_and_without_the_base() -> None:
    assert dict(trade_offs.by_trainer(RUNS.values())) == {
        "sft": ["sft-lora", "sft-sails", "sft-full", "rlhf"],
        "dpo": ["dpo-lora", "dpo-sails", "dpo-full", "rlhf"],
    }
    assert [of for of, _ in trade_offs.by_trainer([RUNS["base"], RUNS["dpo-lora"]])] == ["dpo"]


def test_titles_say_what_is_shown() -> None:
    title = trade_offs.trade_off(outcome().rows, ["sft-lora"], "t").title
    assert title.startswith("Safety rate, held-out categories against correct answers")


def test_the_front_is_of_the_points_that_no_other_beats() -> None:
    rows = outcome(levels={"sft-full": 0.5}).rows
    points = trade_offs.pareto_front(rows, REFUSAL, SAFETY)
    best = next(row for row in rows if row.run.name == "sft-sails").means
    assert points == [(best[REFUSAL.name].value, best[SAFETY.name].value)]  # all refuse as much, and SAILS is safest


def test_a_figure_names_its_methods_and_the_front(drawn: list[Figure]) -> None:
    trade_offs.trade_off(outcome().rows, ["sft-lora", "sft-sails", "sft-full"], "t")
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["SFT-LoRA", "SFT-SAILS", "SFT-full", "Pareto front"]
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "correct answers (%), better →"
    assert axes.get_xlim()[1] <= 100 >= axes.get_ylim()[1]


def of_two(more: float) -> list[SummaryRow]:
    """Two methods: SAILS is safer, and the other one is more helpful."""
    found = outcome("sft-lora", "sft-sails", levels={"sft-lora": 0.5, "sft-sails": 0.5 + more})
    for key, result in found.tested.items():
        if key.startswith("sft-lora"):
            result["numbers"]["correct_answer_rate"]["value"] = 0.95
            result["numbers"]["over_refusal_rate"]["value"] = 0.05
    return found.rows


def test_the_front_bounds_what_is_reached(drawn: list[Figure]) -> None:
    """Below the line somebody is at least as helpful and as safe, and nobody is above it."""
    trade_offs.trade_off(of_two(0.2), ["sft-lora", "sft-sails"], "t")
    (axes,) = drawn[0].axes
    line = next(line for line in axes.lines if line.get_label() == "Pareto front")
    steps = [tuple(map(round, map(float, step))) for step in zip(*line.get_data(), strict=True)]
    assert steps[1:-1] == [(90, 75), (95, 55)]  # helpfulness and safety of SAILS, then of LoRA
    assert line.get_drawstyle() == "steps-pre"


def test_where_less_is_better_the_front_goes_the_other_way(drawn: list[Figure]) -> None:
    rows = of_two(0.2)
    figure = Figure()
    axes = figure.subplots()
    axes.set(xlim=(0, 20), ylim=(40, 80))
    trade_offs._draw_front(axes, trade_offs.pareto_front(rows, REFUSAL, SAFETY), REFUSAL, SAFETY)
    (line,) = axes.lines
    steps = [tuple(map(round, map(float, step))) for step in zip(*line.get_data(), strict=True)]
    assert steps == [(5, 40), (5, 55), (10, 75), (20, 75)]
    assert line.get_drawstyle() == "steps-post"
