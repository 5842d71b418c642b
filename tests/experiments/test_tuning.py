"""The grid of learning rates is extended where its best one is at an end, and doubtful choices are told."""

from typing import Any

import pytest

from sails_align.experiments.plan import RUNS, Cell, Plan
from sails_align.experiments.tuning import Tuning, beyond_end

GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RUN = RUNS["dpo-full"]


@pytest.mark.parametrize(
    ("rates", "merits", "beyond"),
    [
        (GRID, (0.1, 0.2, 0.3, 0.4, 0.5), 0.1),
        (GRID, (0.5, 0.4, 0.3, 0.2, 0.1), 1e-4),
        (GRID, (0.1, 0.2, 0.5, 0.4, 0.3), None),
        (GRID, (0.5, 0.5, 0.5, 0.5, 0.5), None),  # nothing was learnt at any
        (GRID, (0.5, 0.5, 0.3, 0.2, 0.1), None),  # one that is no better than its neighbour is not the end
        (GRID, (0.1, 0.2, 0.3, 0.5, 0.5), None),
        (GRID[::-1], (0.5, 0.4, 0.3, 0.2, 0.1), 0.1),  # in any order
        ((1e-6, 5e-6, 2e-5, 1e-4, 4e-4), (1, 2, 3, 4, 5), 2e-3),
        ((1e-3, 1e-2), (0.1, 0.2), 0.1),
        ((1e-2,), (0.2,), None),  # a rate that was given, not chosen
        ((0.1, 0.9), (0.1, 0.2), None),  # there is none beyond below 1
    ],
)
def test_the_rate_beyond_the_end(rates: tuple[float, ...], merits: tuple[float, ...], beyond: float | None) -> None:
    assert beyond_end(dict(zip(rates, merits, strict=True))) == beyond


def result(merit: float) -> dict:
    return {"numbers": {"safety_rate": {"value": merit}, "correct_answer_rate": {"value": merit}}}


def tuned(plan: Plan, best: float) -> tuple[list[Cell], dict[str, dict]]:
    """Compute what is called for, until it is all there; `best` is the best rate of all."""
    results: dict[str, dict] = {}
    while missing := [cell for cell in plan.tuning_cells(results) if cell.key not in results]:
        results |= {cell.key: result(1 - abs(cell.learning_rate - best)) for cell in missing if cell.learning_rate}
    return plan.tuning_cells(results), results


@pytest.mark.parametrize(
    ("best", "n_extensions", "added", "at_end"),
    [
        (1e-2, 2, [], False),
        (0.1, 2, [0.1, 0.3], False),  # the second one shows that the first one is the best
        (0.9, 2, [0.1, 0.3], True),  # the limit
        (0.9, 0, [], True),
        (0.0, 1, [1e-4], True),
    ],
)
def test_grids_are_extended_up_to_a_limit(best: float, n_extensions: int, added: list[float], at_end: bool) -> None:
    plan = Plan(runs=(RUNS["base"], RUN), n_tuning_seeds=2, n_extensions=n_extensions)
    cells, results = tuned(plan, best)
    assert [cell.learning_rate for cell in cells if cell.seed == 1000] == [*GRID, *added]
    assert len(cells) == 2 * (len(GRID) + len(added))
    tuning = plan.tuning(results)[RUN.name]
    assert (tuning.n_added, tuning.is_at_end) == (len(added), at_end)
    assert plan.choose(results)[RUN.name] == min(tuning.merits, key=lambda rate: abs(rate - best))
    assert any("is at the end of the grid" in doubt for doubt in tuning.doubts()) == at_end
    assert tuning.to_json()["grid"] == sorted([*GRID, *added])
    assert [cell.key for cell in plan.tuning_cells(results)] == [cell.key for cell in cells]


def test_a_grid_that_lacks_results_is_not_extended() -> None:
    plan = Plan(runs=(RUN,))
    cells, results = tuned(plan, 0.9)
    del results[cells[0].key]
    assert len(plan.tuning_cells(results)) == len(GRID)


def test_tuning_seeds_that_disagree_are_told() -> None:
    one, other = ({1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.8, 3e-2: 0.1}, {1e-3: 0.9, 3e-3: 0.8, 1e-2: 0.6, 3e-2: 0.1})
    tuning = Tuning({1000: one, 1001: other})
    assert tuning.disagrees
    assert tuning.best_of_seeds == {1000: 1e-2, 1001: 1e-3}
    assert tuning.chosen == 1e-3 or tuning.spread == pytest.approx(0.2)
    assert any("its 2 tuning seeds would choose 0.01, 0.001" in doubt for doubt in tuning.doubts())
    neighbours = Tuning({1000: one, 1001: {**one, 3e-3: 0.81}})
    assert not neighbours.disagrees
    assert neighbours.doubts() == []


@pytest.mark.parametrize(
    ("best_of_seeds", "n_extensions", "n_seeds", "disagrees"),
    [
        ((1e-2, 1e-2, 1e-3, 1e-3), 2, 2, False),  # no more are needed
        ((1e-2, 3e-3, 1e-3, 1e-3), 2, 2, False),  # neighbours agree
        ((1e-2, 1e-3, 1e-2, 1e-2), 2, 4, True),  # the limit, and it is told
        ((1e-2, 1e-3, 1e-2, 1e-2), 1, 3, True),
        ((1e-2, 1e-3, 1e-2, 1e-2), 0, 2, True),
    ],
)
def test_more_tuning_seeds_are_run_while_they_disagree(
    best_of_seeds: tuple[float, ...], n_extensions: int, n_seeds: int, disagrees: bool
) -> None:
    plan = Plan(runs=(RUN,), n_tuning_seeds=2, n_extensions=n_extensions)
    results: dict[str, dict] = {}
    while missing := [cell for cell in plan.tuning_cells(results) if cell.key not in results]:
        for cell in missing:
            assert cell.learning_rate
            results[cell.key] = result(1 - abs(cell.learning_rate - best_of_seeds[cell.seed - 1000]))
    assert {cell.seed for cell in plan.tuning_cells(results)} == {1000 + n for n in range(n_seeds)}
    tuning = plan.tuning(results)[RUN.name]
    assert (tuning.disagrees, len(tuning.by_seed)) == (disagrees, n_seeds)
    assert any(f"its {n_seeds} tuning seeds would choose" in doubt for doubt in tuning.doubts()) == disagrees


@pytest.mark.parametrize(("knob", "name"), [(False, "learning rate"), (True, "hyperparameter")])
def test_values_that_are_equally_good_are_told(knob: bool, name: str) -> None:
    """As in private training that leaves the model as it is: no value is better, and the first is taken."""
    rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-4)  # the last one was added
    tuning = Tuning({1000: dict(zip(rates, (0.5, 0.5, 0.5, 0.498, 0.19, 0.5), strict=True))}, 1, knob)
    assert tuning.equally_good == tuning.to_json()["equally_good"] == [1e-4, 3e-4, 1e-3, 3e-3]
    told = f"several values of its {name} are equally good on validation prompts (0.0001, 0.0003, 0.001, 0.003); 0.0003"
    assert tuning.doubts()[0].startswith(told)
    clear = Tuning({1000: dict(zip(rates, (0.5, 0.5, 0.6, 0.498, 0.19, 0.5), strict=True))}, 1, knob)
    assert clear.equally_good == [3e-3]
    assert clear.doubts() == []


def test_a_broken_model_is_not_chosen_for_the_few_responses_that_have_a_score() -> None:
    """Of 100 responses to the second rate's model, five have a score, and these are safe and right."""

    def numbers(value: float, n_unscored: int) -> dict[str, Any]:
        of = {"value": value, "n_unscored": n_unscored, "bound_low": value * (100 - n_unscored) / 100}
        return {"numbers": {"safety_rate": of, "correct_answer_rate": of}}

    plan = Plan(runs=(RUN,), learning_rates=(1e-3, 3e-3), n_tuning_seeds=1, n_extensions=0)
    results = {
        cell.key: numbers(0.8, 0) if cell.learning_rate == 1e-3 else numbers(1.0, 95) for cell in plan.tuning_cells()
    }
    assert plan.choose(results) == {RUN.name: 1e-3}
