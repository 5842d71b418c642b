"""Each section of the report, made from results by hand: what appears in it, and when there is none."""

from dataclasses import replace
from typing import Any

import pytest
from made_results import comparison, outcome, result, stored

from sails_align.core.command_line import CommandLine
from sails_align.evaluation.metrics import METRICS
from sails_align.experiments.plan import Cell, Measures, Protocol
from sails_align.experiments.studies import StudyKind, read_plans
from sails_align.experiments.summary import OnSet, Outcome
from sails_align.reporting.page import Grid, Section, difference
from sails_align.reporting.report import ReportData
from sails_align.reporting.sections import SECTIONS


def made(name: str, of: ReportData) -> list[Section]:
    return list(SECTIONS.get(name).load()(of))


def column(grid: Grid, head: str) -> dict[str, str]:
    """Of a table, by the row's name."""
    place = list(grid.head).index(head)
    return {row[0].text: row[place].text for row in grid.rows}


def test_the_sections_come_in_the_order_of_the_registry() -> None:
    titles = [section.title for section in comparison(outcome()).sections]
    assert titles == [
        "What each method reaches",
        "How it was measured",
        "Minus SFT-LoRA",
        "Minus SFT-full",
        "Safety against helpfulness, over learning rates",
        "By category",
        "What it cost",
    ]


def test_headline() -> None:
    section, measured = made("headline", comparison(outcome()))
    first, grid = section.grids
    assert first.head == [
        "method",
        "safety rate, trained categories (%)",
        "safety rate, held-out categories (%)",
        "over-refusal (%)",
        "correct answers (%)",
        "trainable parameters (%)",
    ]
    assert grid.title == "All metrics"
    safety = column(grid, "safety rate, held-out categories (%)")
    assert safety["SFT-SAILS"].startswith("85.1 (")
    assert safety["base"] == "0.0"  # of one model, so there is no interval
    assert column(grid, "learning rate")["base"] == "–"
    assert "safety rate (%)" not in grid.head  # it is told by categories
    assert "win rate (%)" not in grid.head  # which no cell has
    assert any("SFT-SAILS 3" in text and "excluded from all rates" in text for text in measured.text)
    assert [picture.name for picture in section.pictures] == ["sails", "trade_off_sft"]


def test_the_first_table_has_at_most_eight_columns() -> None:
    more = {
        "capability": {"a": 1.0},
        "relearned": {of: {"safety_rate": {"value": 0.5}} for of in ("benign", "harmful")},
    }
    section, _ = made("headline", comparison(outcome(more={"sft-sails": more})))
    first, every = section.grids
    assert len(first.head) == 8
    assert "safety left after benign training (%)" in first.head
    assert "safety left after harmful training (%)" in every.head
    assert set(first.head) < set(every.head)


def side_study(kind: StudyKind, argv: list[str]) -> ReportData:
    """Results of a side study with every metric that it can have."""
    (study,) = read_plans(CommandLine.read(["--study", kind, "--n_seeds", "3", *argv]), None)[2]
    ((label, plan),) = study.plans
    left = {of: {"safety_rate": {"value": 0.5}} for of in ("benign", "harmful")}

    def of(cell: Cell) -> dict[str, Any]:
        made = result(0.5 + 0.01 * (cell.seed % 3), relearned=left, tampering={})
        made["numbers"] |= {name: {"value": 0.5, "n_unscored": 0} for name in ("harmfulness", "task_score")}
        return made

    tuned = {cell.key: of(cell) for cell in plan.tuning_cells()}
    chosen = plan.choose(tuned)
    tested = {cell.key: of(cell) for cell in plan.test_cells(chosen)}
    return ReportData({kind: {label: Outcome(plan, tuned, tested, chosen)}})


@pytest.mark.parametrize(
    ("kind", "argv", "ranked_by"),
    [
        ("methods", ["--methods", "sft-lora", "sft-sails", "sift"], "mean of safety and helpfulness (%)"),
        ("tampering", ["--attacks", "harmful", "--defences", "lox", "wise-ft"], "safety and helpfulness kept (%)"),
    ],
)
def test_the_first_table_of_side_studies_has_at_most_eight_columns(
    kind: StudyKind, argv: list[str], ranked_by: str
) -> None:
    first, every, *_ = made(kind, side_study(kind, argv))[0].grids
    assert 6 < len(first.head) <= 8 < len(every.head)
    assert ranked_by in first.head
    assert "hyperparameter" in every.head
    assert "hyperparameter" not in first.head
    assert every.title == "All metrics"
    assert set(first.head) < set(every.head)
    assert [row[0].text for row in first.rows] == [row[0].text for row in every.rows]


def test_headline_of_other_models() -> None:
    found = outcome("sft-lora", "sft-sails")
    evaluate: Any = tuple((part, "safety", ("--prompts", "xstest")) for part in ("validation", "test"))
    protocol = Protocol("m", evaluate, in_distribution="hh-rlhf", out_of_distribution="hex-phi")
    # keys of cells depend on the protocol, so the numbers are not found: what is told of the setting is looked at
    _, section = made("headline", comparison(replace(found, plan=replace(found.plan, protocol=protocol))))
    assert "Evaluated by sails eval safety (test): --prompts xstest." in section.text
    assert "chosen from one grid" in section.text[0]
    assert "Prompt sets: trained categories: hh-rlhf, held-out categories: hex-phi." in section.text
    assert not any("GCG" in text for text in section.text)


def test_headline_where_no_learning_rate_is_chosen() -> None:
    found = outcome("base", "sft-lora")
    runs = tuple(replace(run, is_tuned=False) for run in found.plan.runs)
    _, section = made("headline", comparison(replace(found, plan=replace(found.plan, runs=runs))))
    assert section.text[0].endswith(
        "Learning rates are those of the recipes or of the runs' options; none was chosen here."
    )


def test_a_learning_rate_that_a_run_gives_is_shown_and_is_not_called_chosen() -> None:
    found = outcome("sft-lora", "sft-sails")
    lora, sails = found.plan.runs
    given = replace(lora, is_tuned=False, options=(*lora.options, "--learning_rate", "2e-4"))
    plan = replace(found.plan, runs=(given, sails))
    pairs = zip(found.plan.test_cells(found.chosen), plan.test_cells({"sft-sails": 1e-3}), strict=True)
    of = Outcome(plan, found.tuned, {new.key: found.tested[old.key] for old, new in pairs}, {"sft-sails": 1e-3})
    section, measured = made("headline", comparison(of))
    assert column(section.grids[1], "learning rate") == {"SFT-LoRA": "0.0002", "SFT-SAILS": "0.001"}
    assert "by the mean of safety rate and correct answers (not chosen: SFT-LoRA)." in measured.text[0]


def test_differences_are_marked_where_the_interval_does_not_touch_zero() -> None:
    lora, full = made("differences", comparison(outcome(levels={"sft-full": 0.799})))
    (grid,) = lora.grids
    place = list(grid.head).index("safety rate, held-out categories (%)")
    marks = {row[0].text: row[place].verdict for row in grid.rows}
    assert marks == {"SFT-SAILS": "better", "SFT-full": "better"}
    of_full = {row[0].text: row[place] for row in full.grids[0].rows}
    assert of_full["SFT-LoRA"].verdict == "worse"
    assert of_full["SFT-SAILS"].verdict == "open"  # 0.1 points, and the interval contains 0
    assert "(-" in of_full["SFT-SAILS"].text


def test_of_one_seed_no_difference_is_marked() -> None:
    for section in made("differences", comparison(outcome(n_seeds=1))):
        for row in section.grids[0].rows:
            assert {entry.verdict for entry in row} == {"open"}
            assert not any(" to " in entry.text for entry in row)


def test_without_baselines_there_are_no_differences() -> None:
    assert made("differences", comparison(outcome("base", "sft-sails"))) == []


def test_fronts() -> None:
    (section,) = made("fronts", comparison(outcome()))
    (grid,) = section.grids
    assert [row[0].text for row in grid.rows] == ["SFT-LoRA", "SFT-SAILS", "SFT-full"]
    assert column(grid, "minus SFT-LoRA")["SFT-LoRA"] == ""  # from itself
    assert column(grid, "minus SFT-LoRA")["SFT-SAILS"].startswith("+")
    assert column(grid, "helpfulness lost at 90% safety (%)")["SFT-LoRA"] == "–"  # it is never as safe
    assert column(grid, "helpfulness lost at 80% safety (%)")["SFT-SAILS"] == "9.1"
    assert made("fronts", comparison(replace(outcome(), tuned={}))) == []


def test_categories() -> None:
    (section,) = made("categories", comparison(outcome()))
    assert [picture.name for picture in section.pictures] == ["safety_harmful", "safety_ood", "over_refusal"]


def test_features() -> None:
    features = stored()["features"]
    found = outcome(n_seeds=2, more={"sft-sails": {"features": features}})
    (section,) = made("features", comparison(found))
    layers, changes = section.grids
    assert [row[0].text for row in layers.rows] == list(features["layers"])
    assert len(changes.rows) == sum(len(of["features"]) for of in features["layers"].values())
    assert section.text[0].startswith("Of SFT-SAILS, 2 seeds.")
    assert "block 3" in section.text[1]
    assert section.meanings == features["meanings"]
    assert made("features", comparison(outcome())) == []


def test_cost() -> None:
    (section,) = made("cost", comparison(outcome("base", "sft-lora", "sft-sails")))
    (grid,) = section.grids
    n_trainings = 2 * 2 * 2 + 2 * 3  # runs, rates and tuning seeds; runs and seeds
    n = n_trainings + 1  # the base model is measured, too
    assert column(grid, "seconds") == {"train": str(3 * n), "evaluate": str(n)}
    assert column(grid, "share (%)") == {"train": "75.0", "evaluate": "25.0"}
    assert section.text[0].startswith(f"{n_trainings} trainings, {4 * n} seconds in all; 100% in stages that run")


def test_ablations() -> None:
    of = outcome("sft-lora", "sft-sails", "k-16", levels={"k-16": 0.5})
    (section,) = made("ablations", comparison(outcome(), ablations={"ablations": of}))
    levels, minus = section.grids
    assert [row[0].text for row in levels.rows] == ["SFT-LoRA", "SFT-SAILS", "k-16"]
    assert [row[0].text for row in minus.rows] == ["SFT-LoRA", "k-16"]  # from SAILS
    assert minus.rows[1][1].verdict == "worse"


def with_examples(n: int, levels: dict[str, float]) -> Outcome:
    of = outcome("sft-lora", "sft-sails", n_seeds=1, levels=levels)
    plan = replace(of.plan, measures=Measures(n_examples=n))
    chosen = of.chosen
    by_old = dict(zip(of.plan.test_cells(chosen), plan.test_cells(chosen), strict=True))
    return replace(of, plan=plan, tested={new.key: of.tested[old.key] for old, new in by_old.items()})


def test_examples() -> None:
    study = {
        "16": with_examples(16, {"sft-lora": 0.1, "sft-sails": 0.9}),
        "64": with_examples(64, {"sft-lora": 0.2, "sft-sails": 1.0}),
    }
    (section,) = made("examples", comparison(outcome(), examples=study))
    needed, *levels = section.grids
    assert needed.head[1] == "harmful examples to 95% safety rate, trained categories"
    assert [row[1].text for row in needed.rows] == ["more than 64", "32"]  # between 16 and 64, over their logarithm
    safety = next(grid for grid in levels if grid.head[0] == "safety rate, trained categories (%)")
    assert [entry.text for entry in safety.rows[1]] == ["SFT-SAILS", "90.0", "100.0"]
    assert section.text[0].startswith("Trained on n harmful and n harmless examples, with 1 seed. ")
    assert section.findings == [
        "To reach 95% safety rate on trained categories, SFT-LoRA takes more than 64 harmful examples, SFT-SAILS takes "
        "32 harmful examples (means over 1 seed, without intervals)."
    ]


def test_worlds() -> None:
    study = {"testbed:1": outcome(), "shared_harm=0": outcome(levels={"sft-sails": 0.5})}
    (section,) = made("worlds", comparison(outcome(), worlds=study))
    minus = next(grid for grid in section.grids if grid.head[0] == "SFT-SAILS minus SFT-LoRA")
    assert [row[0].text for row in minus.rows] == ["testbed:1", "shared_harm=0"]
    assert [row[1].verdict for row in minus.rows] == ["better", "worse"]
    assert section.grids[-1].head[0] == "shared_harm=0"  # what each method reaches there
    assert "worlds_sft-lora" in [picture.name for picture in section.pictures]


def number(value: float, n: int, n_unscored: int = 0) -> dict[str, Any]:
    return {"value": value, "n": n, "n_unscored": n_unscored}


def on_sets(advbench: float, xstest: float, **more: Any) -> dict[str, Any]:
    xstest_rates = {"refusal_rate": number(1.0, 200), "over_refusal_rate": number(xstest, 240, 10)}
    return {"by_set": {"advbench": {"refusal_rate": number(advbench, 520)}, "xstest": xstest_rates, **more}}


def test_each_prompt_set_has_a_line_for_each_of_its_rates() -> None:
    other = {"refusal_rate": number(0.5, 10), "harmfulness": number(3.0, 10)}
    levels = {"base": on_sets(0.05, 0.0), "sft-lora": on_sets(0.5, 0.25), "sft-sails": on_sets(0.75, 0.5)}
    levels["sft-sails"] = on_sets(0.75, 0.5, **{"data/mine.csv": other})  # which only one run has
    data = comparison(outcome("base", "sft-lora", "sft-sails", more=levels))
    (section,) = made("sets", data)
    reached, minus = section.grids
    assert column(reached, "SFT-SAILS") == {
        "refusal rate (%), advbench": "75.0",
        "refusal rate (%), xstest": "100.0",
        "over-refusal (%), xstest": "50.0",
        "refusal rate (%), mine.csv": "50.0",
    }
    assert list(column(reached, "prompts").values()) == ["520", "200", "250", "10"]
    assert column(reached, "base")["refusal rate (%), advbench"] == "5.0"
    assert minus.head == ["SFT-SAILS", "prompts", "minus SFT-LoRA"]
    assert list(column(minus, "minus SFT-LoRA").values()) == ["+25.0", "+0.0", "+25.0", "–"]
    first = data.to_json()["sets"][0]
    assert (first["set"], first["metric"], first["n_prompts"]) == ("advbench", "refusal_rate", 520)
    assert first["means"]["sft-sails"]["value"] == 0.75
    assert first["differences"]["sft-sails"]["sft-lora"]["value"] == 0.25


@pytest.mark.parametrize(
    "of_lora",
    [{}, {"by_set": {"advbench": {"refusal_rate": number(0.5, 520)}}}],
    ids=["results of an earlier version", "one set"],
)
def test_prompt_sets_that_are_not_told_apart_have_no_section(of_lora: dict[str, Any]) -> None:
    of_sails = {"by_set": {"advbench": {"refusal_rate": number(0.75, 520)}}}
    if not of_lora:
        of_sails = on_sets(0.75, 0.5)
    assert (
        made("sets", comparison(outcome("sft-lora", "sft-sails", more={"sft-lora": of_lora, "sft-sails": of_sails})))
        == []
    )


def test_differences_on_a_prompt_set_are_paired_by_seed() -> None:
    metric = METRICS["over_refusal_rate"]
    of = OnSet("a", metric, 9, {"sft-lora": {0: 0.1, 1: 0.5, 2: 0.3}, "sft-sails": {0: 0.2, 1: 0.59, 2: 0.41, 3: 0.9}})
    assert of.mean("sft-lora").value == pytest.approx(0.3)
    minus = of.difference("sft-sails", "sft-lora")
    assert (minus.n, minus.value) == (3, pytest.approx(0.1))
    assert minus.is_above_zero  # seed by seed; the levels themselves vary more
    assert difference(minus, metric).verdict == "worse"


@pytest.mark.parametrize("name", ["sets", "ablations", "examples", "worlds"])
def test_without_its_results_there_is_no_section(name: str) -> None:
    assert made(name, comparison(outcome())) == []
