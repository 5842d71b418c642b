"""Plans of comparisons: which cells there are, what tells them apart, and how learning rates are chosen."""

from dataclasses import replace

import pytest

from sails_align.core.errors import InputError
from sails_align.experiments.plan import FIRST_TUNING_SEED, RUNS, Measures, Plan

PLAN = Plan(n_seeds=3, n_tuning_seeds=2, learning_rates=(1e-3, 1e-2))
OF_VALIDATION = replace(PLAN.measures, n_attacked=0, n_capability=0, relearning=False)


def test_all_methods_have_the_same_budget_and_grid():
    cells = PLAN.tuning_cells()
    tuned = [run for run in PLAN.runs if run.is_tuned]
    assert len(cells) == len(tuned) * 2 * 2
    for run in tuned:
        own = [cell for cell in cells if cell.run == run]
        assert {cell.learning_rate for cell in own} == {1e-3, 1e-2}
        assert {cell.measures for cell in own} == {OF_VALIDATION}
    assert {cell.part for cell in cells} == {"validation"}


def test_what_is_tuned_on_is_not_reported():
    chosen = {run.name: 1e-3 for run in PLAN.runs if run.is_tuned}
    reported = PLAN.test_cells(chosen)
    assert {cell.part for cell in reported} == {"test"}
    assert not {cell.seed for cell in reported} & {cell.seed for cell in PLAN.tuning_cells()}
    assert [cell.run.name for cell in reported].count("base") == 1  # it has no seed
    assert [cell.run.name for cell in reported].count("rlhf") == 1  # of a reference there is one
    assert [cell.run.name for cell in reported].count("sft-full") == 3
    with pytest.raises(InputError, match="first_seed is 998"):
        Plan(n_seeds=5, first_seed=FIRST_TUNING_SEED - 2)


def test_attacks_are_on_the_first_seeds_alone():
    cells = replace(PLAN, n_attacked_seeds=2).test_cells({run.name: 1e-3 for run in PLAN.runs if run.is_tuned})
    assert {cell.seed for cell in cells if cell.measures.n_attacked} == {0, 1}
    assert {replace(cell.measures, n_attacked=8) for cell in cells} == {PLAN.measures}


def test_keys_tell_apart_what_decides_a_result_and_nothing_else():
    cell = PLAN.tuning_cells()[0]
    same = replace(cell, run=replace(cell.run, label="another label"))
    others = [
        replace(cell, seed=7),
        replace(cell, learning_rate=5e-3),
        replace(cell, part="test"),
        replace(cell, world="testbed:1"),
        replace(cell, measures=Measures(n_examples=64)),
        replace(cell, run=replace(cell.run, options=("--init", "olora"))),
    ]
    grids = [replace(cell, run=replace(cell.run, grid=grid)) for grid in ((5e-3, 1.0), (5e-3, 1.0, 3.0))]
    assert grids[0].key == grids[1].key != cell.key
    assert same.key == cell.key
    assert len({cell.key, *(other.key for other in others)}) == 1 + len(others)


def test_what_is_measured_on_the_test_part_does_not_change_validation_cells() -> None:
    cheap = replace(PLAN, measures=OF_VALIDATION)
    assert [cell.key for cell in cheap.tuning_cells()] == [cell.key for cell in PLAN.tuning_cells()]
    chosen = {run.name: 1e-3 for run in PLAN.runs if run.is_tuned}
    tests = [{cell.key for cell in plan.test_cells(chosen)} for plan in (cheap, PLAN)]
    assert not tests[0] & tests[1]


def test_the_rate_with_the_best_mean_over_seeds_is_chosen():
    merits = {(1e-3, 0): 0.9, (1e-3, 1): 0.1, (1e-2, 0): 0.6, (1e-2, 1): 0.6}
    results = {}
    for cell in PLAN.tuning_cells():
        merit = merits[cell.learning_rate, cell.seed - FIRST_TUNING_SEED]
        value = {"value": merit}
        results[cell.key] = {"numbers": {"safety_rate": value, "correct_answer_rate": value}}
    assert set(PLAN.choose(results).values()) == {1e-2}
    assert PLAN.choose(results).keys() == {run.name for run in RUNS.values() if run.is_tuned}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"runs": ()}, "no runs"),
        ({"runs": (RUNS["base"], RUNS["base"])}, "named twice"),
        ({"learning_rates": ()}, "learning rates are"),
        ({"learning_rates": (0.0,)}, "learning rates are"),
        ({"n_seeds": 0}, "n_seeds is 0"),
        ({"n_tuning_seeds": 0}, "n_tuning_seeds is 0"),
    ],
)
def test_plans_that_make_no_sense(options, says):
    with pytest.raises(InputError, match=says):
        Plan(**options)
