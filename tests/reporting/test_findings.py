"""The sentences that a report begins with: right for each outcome, and no more than the intervals show."""

from dataclasses import replace
from typing import Any

import pytest
from made_results import comparison, outcome, result

from sails_align.core.command_line import CommandLine
from sails_align.evaluation.metrics import METRICS
from sails_align.experiments.plan import Cell, Part, Protocol
from sails_align.experiments.studies import StudyKind, read_plans
from sails_align.experiments.summary import Mean, Outcome
from sails_align.reporting.findings import counts, from_others, in_doubt, in_metrics, not_known, of_metrics
from sails_align.reporting.page import Grid
from sails_align.reporting.report import ReportData

SAFETY, REFUSAL, MERIT = METRICS["safety_rate_out_of_distribution"], METRICS["over_refusal_rate"], METRICS["merit"]
UP, DOWN, OPEN = Mean(0.1, 0.05, 0.15, 5), Mean(-0.1, -0.15, -0.05, 5), Mean(0.1, -0.02, 0.22, 5)
OF_TWO, EQUAL, MISSING = Mean(0.1, None, None, 2), Mean(0.0, None, None, 5), Mean(None, None, None, 0)


def told(mean: Mean, metric: Any = SAFETY) -> str:
    return in_metrics("A", "B", of_metrics({metric.name: mean}, [metric]))


@pytest.mark.parametrize(
    ("mean", "metric", "sentence"),
    [
        (UP, SAFETY, "A is better than B in safety rate on held-out categories: +10.0 (+5.0 to +15.0)."),
        (DOWN, SAFETY, "A is worse than B in safety rate on held-out categories: -10.0 (-15.0 to -5.0)."),
        (DOWN, REFUSAL, "A is better than B in over-refusal: -10.0 (-15.0 to -5.0)."),
        (UP, REFUSAL, "A is worse than B in over-refusal: +10.0 (+5.0 to +15.0)."),
        (OPEN, REFUSAL, "No difference of A from B is shown in over-refusal: +10.0 (-2.0 to +22.0)."),
        (OF_TWO, REFUSAL, "With 2 seeds there is no interval, and no claim is made. A minus B: over-refusal: +10.0."),
        (MISSING, REFUSAL, "A and B have no metric in common."),
    ],
)
def test_a_difference_is_said_by_its_interval(mean: Mean, metric: Any, sentence: str) -> None:
    assert told(mean, metric) == sentence


def test_equal_seeds_have_no_interval_and_the_sentence_does_not_blame_their_number() -> None:
    assert "With 5 seeds" not in told(EQUAL)
    assert "all seeds have the same difference" in told(EQUAL)


def test_metrics_are_grouped_by_verdict() -> None:
    means = {SAFETY.name: UP, REFUSAL.name: UP, MERIT.name: OPEN}
    sentences = in_metrics("A", "B", of_metrics(means, [SAFETY, REFUSAL, MERIT])).split(". ")
    assert [sentence.split(" in ")[0] for sentence in sentences] == [
        "A is better than B",
        "A is worse than B",
        "No difference of A from B is shown",
    ]


def test_a_control_that_is_not_beaten_is_said_to_leave_something_open() -> None:
    beaten = from_others("A", {"random": (UP, MERIT)}, "By merit")
    assert beaten == "By merit, A is better than random: +10.0 (+5.0 to +15.0)."
    both = from_others("A", {"random": (UP, MERIT), "blocks": (OPEN, MERIT)}, "By merit")
    assert "It is not shown to differ from blocks: +10.0 (-2.0 to +22.0)." in both
    assert both.endswith("There is no evidence that A adds anything to the controls that it does not beat.")
    worse = from_others("A", {"random": (DOWN, MERIT)}, "By merit")
    assert "A is worse than random" in worse
    assert worse.endswith("There is no evidence that A adds anything to this control.")
    none = from_others("A", {"random": (DOWN, MERIT), "blocks": (OPEN, MERIT)}, "By merit")
    assert none.endswith("There is no evidence that A adds anything to these controls.")


def test_without_intervals_nothing_is_said_of_controls() -> None:
    sentence = from_others("A", {"random": (OF_TWO, MERIT)}, "By merit")
    assert sentence == "By merit, with 2 seeds there is no interval, and no claim is made. A minus random: +10.0."


def test_verdicts_are_counted_and_named() -> None:
    found = {"a": (UP, MERIT), "b": (DOWN, MERIT), "c": (OPEN, MERIT), "d": (EQUAL, MERIT), "e": (MISSING, MERIT)}
    sentence = counts(found, "change", "better than A")
    assert sentence == (
        "Of 4 changes, 1 is better than A (a), 1 is worse (b), 1 is not shown to differ, and 1 is without an interval."
    )
    assert counts({"b": (OPEN, MERIT)}, "change", "better") == (
        "Of 1 change, none is better, and 1 is not shown to differ."
    )
    of_two = counts({"a": (OF_TWO, MERIT)}, "change", "better than A")
    assert of_two.startswith("With 2 seeds there is no interval, and no claim is made about whether 1 change is")
    many = counts({f"run {i}": (UP, MERIT) for i in range(9)}, "change", "better than A")
    assert many.startswith("Of 9 changes, 9 are better than A (run 0, ")
    assert many.endswith("run 5, 3 more).")


def findings(main: Outcome, **studies: dict[str, Outcome]) -> list[str]:
    return [sentence for section in comparison(main, **studies).sections for sentence in section.findings]


def test_the_main_study_is_told_against_its_first_baseline_and_its_controls() -> None:
    main = outcome("sft-lora", "sft-sails", "sft-full", "sft-random-features", levels={"sft-random-features": 0.9})
    baseline, controls = findings(main)
    assert baseline.startswith("SFT-SAILS is better than SFT-LoRA in safety rate on trained categories: +20.1 (")
    assert "over-refusal" in baseline  # where all seeds have the same
    assert controls.startswith(
        "Against controls, by the mean of safety and helpfulness, SFT-SAILS is worse than sft-random"
    )


def test_controls_may_be_those_of_the_ablations() -> None:
    of = outcome("sft-sails", "basis-random-features", "lora-last-blocks", levels={"lora-last-blocks": 0.801})
    _, controls, ablations = findings(outcome(), ablations={"ablations": of})
    assert "SFT-SAILS is better than basis-random-features" in controls
    assert "not shown to differ from lora-last-blocks" in controls
    assert ablations.startswith(
        "Of 2 ablations, none is better than SFT-SAILS by the mean of safety and helpfulness, 1 is worse"
    )


def test_what_is_missing_is_said() -> None:
    baseline, controls = findings(outcome("base", "sft-sails"))
    assert baseline == (
        "No baseline (SFT-LoRA, SFT-full, DPO-LoRA, DPO-full) is in this comparison, so there is no evidence of a gain "
        "by SFT-SAILS."
    )
    assert controls == (
        "No control (LoRA in the same blocks, random SAE features, random directions) was run, so there is no evidence "
        "that the SAE features add anything."
    )
    assert findings(outcome("base", "sft-lora")) == [
        "No run of SAILS is compared here. The tables show how the methods differ."
    ]


def test_dpo_is_told_against_dpo() -> None:
    main = outcome("sft-lora", "dpo-lora", "dpo-sails", levels={"dpo-sails": 0.9})
    assert "DPO-SAILS minus DPO-LoRA: " in findings(main)[0]


def test_two_seeds_make_no_claim() -> None:
    sentences = findings(outcome(n_seeds=2))
    assert not any(word in " ".join(sentences) for word in ("better", "worse", "No difference"))
    assert sentences[0].startswith("With 2 seeds there is no interval, and no claim is made.")
    assert "there are only 2 seeds, too few for intervals" in not_known([outcome(n_seeds=2)])[0]
    assert "there is only 1 seed, too few for intervals" in not_known([outcome(n_seeds=1)])[0]


def test_what_is_not_known_is_said_last() -> None:
    (sentence,) = not_known([outcome()])
    assert sentence.startswith("Not known, or in doubt: there are only 3 seeds; ")
    assert "10 responses could not be scored" in sentence  # one of each of 3 runs and 3 seeds, and of the base
    assert "one tuning seed" not in sentence
    assert sentence.endswith("one tiny world says nothing about large models.")
    one = outcome()
    (sentence,) = not_known([replace(one, plan=replace(one.plan, n_tuning_seeds=1))])
    assert "learning rates were chosen with one tuning seed" in sentence


def test_unstable_seeds_are_named() -> None:
    broken = outcome(levels={"sft-lora": 0.6})
    of_seeds = [cell for key, cell in broken.tested.items() if key.startswith("sft-lora")]
    for cell in of_seeds[1:]:
        cell["numbers"]["correct_answer_rate"]["value"] = 0.0
    assert "seeds are unstable, so that means describe no model: SFT-LoRA" in not_known([broken])[0]
    (baseline, _) = findings(broken)
    assert "SFT-LoRA (unstable)" in baseline
    of_seeds[0]["numbers"]["correct_answer_rate"]["value"] = 0.0  # now the seeds are alike
    alike = replace(broken, tuned={})
    assert "unstable" not in not_known([alike])[0]
    (section,) = in_doubt("", alike)
    assert section.text == ["SFT-LoRA: it gives next to no right answer on any seed: correct answers (%) at most 0.0."]


def with_refusals(of: Outcome) -> Outcome:
    """The same with refusal rates in place of safety rates, of another model than the testbed."""
    parts: tuple[Part, ...] = ("validation", "test")
    protocol = Protocol("smollm2", tuple((part, "safety", ("--prompts", "twins")) for part in parts))
    plan = replace(of.plan, protocol=protocol)
    for cell in (*of.tuned.values(), *of.tested.values()):
        numbers = cell["numbers"]
        for name in [name for name in numbers if name.startswith("safety_rate")]:
            numbers[name.replace("safety", "refusal")] = numbers.pop(name)
    tuning = zip(of.plan.tuning_cells(), plan.tuning_cells(), strict=True)
    tests = zip(of.plan.test_cells(of.chosen), plan.test_cells(of.chosen), strict=True)
    tuned = {new.key: of.tuned[old.key] for old, new in tuning}
    return Outcome(plan, tuned, {new.key: of.tested[old.key] for old, new in tests}, of.chosen)


def test_refusals_are_not_called_safety() -> None:
    found = with_refusals(outcome("sft-lora", "sft-sails", "sft-random-basis"))
    baseline, controls = findings(found)
    assert "refusal rate on held-out categories" in baseline
    assert "by the mean of refusal rate and correct answers" in controls
    for section in comparison(found).sections:
        texts = [section.title, *section.text, *(heading for grid in section.grids for heading in grid.head)]
        texts += [picture.title for picture in section.pictures]
        shown = " ".join(texts).replace("sails eval safety", "")  # the command
        assert "safety" not in shown.lower(), section.title
    (unknown,) = not_known([found])
    assert "the judge knows refusals and not harm" in unknown
    assert unknown.endswith("this is one model only.")


def test_refusals_left_by_an_attack_are_not_called_safety() -> None:
    found = tampered("lox", "wise-ft", "lox-random")
    for cell in (*found.tuned.values(), *found.tested.values()):
        numbers = cell["numbers"]
        for name in [name for name in numbers if name.startswith("safety_rate")]:
            numbers[name.replace("safety", "refusal")] = numbers.pop(name)
    section = ReportData({"tampering": {"harmful": found}}).sections[0]
    headings = [heading for grid in section.grids for heading in grid.head]
    assert "refusals and helpfulness kept (%)" in headings
    assert not any("safety" in text for text in (*headings, *section.findings))
    assert "What is left of its refusals is measured" in section.text[0]
    for cell in (*found.tuned.values(), *found.tested.values()):
        del cell["numbers"]["correct_answer_rate"]
    of_refusals = ReportData({"tampering": {"harmful": replace(found)}}).sections[0]
    assert "refusals kept (%)" in [heading for grid in of_refusals.grids for heading in grid.head]


@pytest.mark.parametrize("n_seeds", [2, 3])
def test_a_report_of_methods_alone_has_findings(n_seeds: int) -> None:
    levels = {"sift": 0.9, "sift-random": 0.5}
    of = outcome("sft-lora", "sift", "sift-random", n_seeds=n_seeds, levels=levels)
    kind: StudyKind = "methods"
    data = ReportData({kind: {"methods": of}})
    from_lora, from_control = (sentence for section in data.sections for sentence in section.findings)
    assert "better than SFT-LoRA by the mean of safety and helpfulness" in from_lora
    assert "better than their control (of several, the best)" in from_control
    if n_seeds == 2:
        assert from_lora.startswith(
            "With 2 seeds there is no interval, and no claim is made about whether 1 method is better"
        )
    else:  # all seeds have the same difference
        assert from_control.startswith("Where all seeds have the same difference there is no interval")


def test_a_method_with_two_controls_is_compared_with_both() -> None:
    kind: StudyKind = "methods"
    of = outcome("gate", "steering", "gate-random", "guard", "guard-shuffled", levels={"gate": 0.9})
    (section,) = [section for section in ReportData({kind: {"methods": of}}).sections if section.title == "All methods"]
    (grid,) = [grid for grid in section.grids if grid.head[0] == "method minus control"]
    assert [row[0].text for row in grid.rows] == [
        "gate minus steering",
        "gate minus gate-random",
        "guard minus guard-shuffled",
    ]


def test_a_method_beats_its_controls_only_where_it_beats_the_best_of_them() -> None:
    kind: StudyKind = "methods"
    levels = {"gate": 0.7, "steering": 0.75, "gate-random": 0.5, "guard": 0.8, "guard-shuffled": 0.5}
    of = outcome(*levels, levels=levels)
    for cell in of.plan.test_cells(of.chosen):  # seeds must differ for intervals
        safety = levels[cell.run.name] + 0.001 * cell.seed * len(cell.run.name)
        of.tested[cell.key]["numbers"]["safety_rate"]["value"] = safety
    (section,) = [section for section in ReportData({kind: {"methods": of}}).sections if section.title == "All methods"]
    (of_controls,) = section.findings
    assert of_controls == (
        "Of 2 controlled methods, 1 is better than their control (of several, the best) by the mean of safety and "
        "helpfulness (guard), and 1 is worse (gate)."
    )


def test_garbled_responses_are_in_the_table_of_methods_where_they_were_counted() -> None:
    kind: StudyKind = "methods"

    def headings(of: Outcome) -> list[list[str]]:
        return [list(grid.head) for section in ReportData({kind: {"methods": of}}).sections for grid in section.grids]

    of = outcome("sft-lora", "sift", "sift-random")
    heading = METRICS["garbled_rate"].heading
    assert not any(heading in names for names in headings(of)), "results without it are reported as they were"
    for cell in of.tested.values():
        cell["numbers"]["garbled_rate"] = {"value": 0.25, "n_unscored": 0}
    _, levels, *differences = headings(replace(of, tuned={}))
    assert heading in levels
    assert not any(heading in names for names in differences)


def test_further_training_is_told_of_where_it_was_measured() -> None:
    kind: StudyKind = "methods"

    def text(of: Outcome) -> str:
        return next(iter(ReportData({kind: {"methods": of}}).sections)).text[0]

    of = outcome("sft-lora", "sift", "sift-random")
    assert "further training" not in text(of)
    for cell in of.tested.values():
        cell["relearned"] = {"benign": {"safety_rate": {"value": 0.25, "n_unscored": 0}}}
    assert "is measured after further training of all weights" in text(replace(of, tuned={}))


def test_what_is_in_doubt_has_a_section_of_its_own() -> None:
    of = outcome("sft-lora", "sift")
    (section,) = in_doubt("All methods", of)
    assert all("several values of its learning rate are equally good" in doubt for doubt in section.text)
    plan = replace(of.plan, learning_rates=(1e-4, 1e-3, 1e-2))
    clear = {cell.key: result(0.5 + 0.4 * (cell.learning_rate == 1e-3)) for cell in plan.tuning_cells()}
    assert not list(in_doubt("All methods", replace(of, plan=plan, tuned=clear)))
    rising = {cell.key: result(0.4 * (cell.learning_rate or 0)) for cell in of.plan.tuning_cells()}
    chosen = of.plan.choose(rising)
    tested = {cell.key: result(0.5) for cell in of.plan.test_cells(chosen)}
    (section,) = in_doubt("All methods", Outcome(of.plan, rising, tested, chosen))
    assert section.title == "All methods, what is in doubt"
    assert [doubt.partition(": ")[0] for doubt in section.text] == ["SFT-LoRA", "sift"]
    assert all("its learning rate 0.01 is at the end of the grid" in doubt for doubt in section.text)


def tampered(*defences: str, n_seeds: int = 3, run: str = "sft-sails") -> Outcome:
    """A study in which LoX keeps most, on all seeds, and GuardSpace as much as the best control on some.

    Without a defence, SAILS keeps more than other runs.
    """
    argv = ["--study", "tampering", "--attacks", "harmful", "--n_seeds", str(n_seeds), "--defences", *defences]
    argv += ["--tampered", run]
    (study,) = read_plans(CommandLine.read(argv), None)[2]
    ((_, plan),) = study.plans

    def of(cell: Cell) -> dict[str, Any]:
        level = {"lox": 0.9, "lox-random": 0.5, "wise-ft": 0.7, "guardspace": 0.7}.get(cell.run.name, 0.3)
        level -= 0.0 if run == "sft-sails" else 0.1 + 0.01 * (cell.seed % 2)
        own = {"lox": 0.001 * (cell.seed % 2), "guardspace": 0.01 * (cell.seed % 3 - 1)}.get(cell.run.name, 0.0)
        return result(level + own + 0.02 * (cell.seed % 3), tampering={})

    tuned = {cell.key: of(cell) for cell in plan.tuning_cells()}
    chosen = plan.choose(tuned)
    return Outcome(plan, tuned, {cell.key: of(cell) for cell in plan.test_cells(chosen)}, chosen)


@pytest.mark.parametrize(
    ("defences", "n_seeds", "words"),
    [
        (
            ("lox", "guardspace", "wise-ft", "lox-random"),
            3,
            "1 of 2 methods beats every control by safety and helpfulness kept: LoX (91.0%). "
            "Without a defence, 47.2% are kept.",
        ),
        (
            ("guardspace", "wise-ft"),
            3,
            "none of 1 method beats every control by safety and helpfulness kept. Without a defence, 47.2% are kept.",
        ),
        (
            ("derta", "lox", "lox-random"),
            3,
            "1 of 1 method beats every control by safety and helpfulness kept: LoX (91.0%); there is no control for "
            "DeRTa (47.2%). Without a defence, 47.2% are kept.",
        ),
        (("lox", "guardspace", "wise-ft"), 2, "2 seeds give no interval, and no claim is made."),
        (("lox",), 3, "no control was run, so there is no evidence that any defence works."),
        (("wise-ft",), 3, "no methods were run, only controls."),
    ],
)
def test_a_report_of_tampering_alone_names_what_beats_every_control(
    defences: tuple[str, ...], n_seeds: int, words: str
) -> None:
    data = ReportData({"tampering": {"harmful": tampered(*defences, n_seeds=n_seeds)}})
    (finding,) = (sentence for section in data.sections for sentence in section.findings)
    assert finding == f"Against the attack harmful, {words}"


def test_a_report_of_tampering_has_each_method_minus_its_controls() -> None:
    """Those that all are compared with, and its own one: random directions of LoX say nothing of GuardSpace."""
    found = tampered("lower-rate", "wise-ft", "lox", "lox-random", "guardspace")

    def grid() -> Grid:
        (section,) = ReportData({"tampering": {"harmful": found}}).sections[:1]
        return next(grid for grid in section.grids if grid.head[0] == "safety and helpfulness kept (%)")

    assert grid().head[1:] == ["minus lower learning rate", "minus WiSE-FT", "minus its own control"]
    rows = {row[0].text: row[1:] for row in grid().rows}
    assert list(rows) == ["LoX", "GuardSpace"]
    assert [cell.verdict for cell in rows["LoX"]] == ["better"] * 3
    assert [(cell.verdict, bool(cell.text)) for cell in rows["GuardSpace"]] == [
        ("better", True),
        ("open", True),
        ("open", False),
    ]
    for run, results in found.by_run.items():
        for cell in results.values():
            cell["moved"] = {"aligned": 0.0, "lower-rate": 0.1, "none": 0.2}.get(run, 0.15)
    assert grid().head[-1] == "minus a lower learning rate at the same distance"
    assert {row[0].text: row[-1].verdict for row in grid().rows} == {"LoX": "better", "GuardSpace": "better"}


def test_a_report_of_tampering_says_what_defences_are_chosen_by() -> None:
    def chosen_by(outcome: Outcome) -> str:
        (section,) = ReportData({"tampering": {"harmful": outcome}}).sections[:1]
        return section.text[0].partition("other seed): ")[2].partition(". Controls")[0]

    assert (
        chosen_by(tampered("lox"))
        == "the harmonic mean of safety rate and correct answers, minus over-refusal beyond 30%"
    )
    found = tampered("lox")
    for cell in (*found.tuned.values(), *found.tested.values()):
        del cell["numbers"]["correct_answer_rate"]
    assert chosen_by(found) == "the safety rate, minus over-refusal beyond 30%"


def test_without_defences_a_report_of_tampering_has_levels_and_claims_nothing() -> None:
    (section,) = ReportData({"tampering": {"harmful": tampered("none")}}).sections[:1]
    grid, _ = section.grids
    assert [row[0].text for row in grid.rows] == ["before the attack", "none"]
    assert not section.findings
    assert not section.pictures


def test_several_attacked_models_are_compared_without_a_defence() -> None:
    """The first model minus the other, paired by seed."""
    first, other = (tampered("none", run=run) for run in ("sft-sails", "sft-lora"))
    outcomes = {"harmful, sft-sails": first, "harmful, sft-lora": other}
    (section,) = (of for of in ReportData({"tampering": outcomes}).sections if "several models" in of.title)
    ((name, safety, *_),) = section.grids[0].rows
    assert name.text == "minus SFT-LoRA"
    assert safety.verdict == "better"
    (finding,) = section.findings
    assert finding.startswith("The attack harmful (")
    assert ") was tried on models without a defence. SFT-SAILS is better than SFT-LoRA in safety" in finding


def test_worlds_are_counted() -> None:
    worlds = {"testbed:1": outcome(), "shared_harm=0": outcome(levels={"sft-sails": 0.5})}
    assert findings(outcome(), worlds=worlds)[-1] == (
        "Of 2 other worlds, 1 is better for SFT-SAILS than for SFT-LoRA by the mean of safety and helpfulness "
        "(testbed:1), and 1 is worse (shared_harm=0)."
    )
