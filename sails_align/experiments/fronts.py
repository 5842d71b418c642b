"""Safety against what it costs, over a method's learning rates or knob: its front."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field

from sails_align.evaluation.intervals import SHARE
from sails_align.evaluation.metrics import safety_rate_of
from sails_align.experiments.merits import helpfulness
from sails_align.experiments.plan import Run
from sails_align.experiments.summary import Mean, Outcome, Result, mean_of, paired_values, value_of


@dataclass(frozen=True)
class Point:
    """What one learning rate reaches on the validation part."""

    lost: float
    """Lost helpfulness (see `merits.helpfulness`): harmless requests that are refused or answered wrongly."""
    safety: float
    over_refusal: float


@dataclass(frozen=True)
class Front:
    """Safety of a method against lost helpfulness, over its learning rates.

    Over-refusal would not do: a model that training has broken refuses nothing and complies with nothing.
    """

    run: Run
    points: tuple[Point, ...]
    """Means over the tuning seeds."""
    of_seeds: Mapping[int, tuple[Point, ...]] = field(default_factory=dict)
    """Points of each tuning seed."""

    @property
    def hypervolumes(self) -> dict[int, float]:
        """Hypervolume of each tuning seed's own front."""
        return {seed: Front(self.run, points).hypervolume for seed, points in self.of_seeds.items()}

    @property
    def mean_hypervolume(self) -> Mean:
        """Mean over the tuning seeds."""
        return mean_of(list(self.hypervolumes.values()), SHARE)

    @property
    def pareto(self) -> tuple[Point, ...]:
        """The untrained model, which loses nothing, then the points that no other one beats, by lost helpfulness."""
        kept = [Point(0.0, 0.0, 0.0)]
        for point in sorted(self.points, key=lambda point: (point.lost, -point.safety)):
            if point.safety > kept[-1].safety:
                kept.append(point)
        return tuple(kept)

    @property
    def hypervolume(self) -> float:
        """Area that the front dominates, in the unit square of lost helpfulness and safety."""
        kept = [*self.pareto, Point(1.0, 0.0, 0.0)]
        return sum((right.lost - left.lost) * left.safety for left, right in itertools.pairwise(kept))

    def at(self, safety: float) -> Point | None:
        """Interpolate the front linearly at a safety rate; None if it is not reached."""
        for left, right in itertools.pairwise(self.pareto):
            if left.safety < safety <= right.safety:
                share = (safety - left.safety) / (right.safety - left.safety)
                return Point(
                    left.lost + share * (right.lost - left.lost),
                    safety,
                    left.over_refusal + share * (right.over_refusal - left.over_refusal),
                )
        return None


def fronts_of(outcome: Outcome) -> list[Front]:
    """Return the front of each run with a grid; none where no helpfulness was measured that could be lost."""
    found: dict[str, dict[int, list[Point]]] = {}
    for cell in outcome.plan.tuning_cells(outcome.tuned):
        if cell.key in outcome.tuned and helpfulness(outcome.tuned[cell.key]) is not None:
            of_seed = found.setdefault(cell.run.name, {}).setdefault(cell.seed, [])
            of_seed.append(_point(outcome.tuned[cell.key]))

    def mean(points: Sequence[Point]) -> Point:
        return Point(*(sum(values) / len(points) for values in zip(*map(astuple, points), strict=True)))

    return [
        Front(
            run,
            tuple(mean(points) for points in zip(*found[run.name].values(), strict=True)),
            {seed: tuple(points) for seed, points in found[run.name].items()},
        )
        for run in outcome.plan.runs
        if run.name in found
    ]


def _point(result: Result) -> Point:
    lost = 1 - (helpfulness(result) or 0.0)
    safety = value_of(result, safety_rate_of(result["numbers"]) or "safety_rate")
    return Point(lost, safety or 0.0, value_of(result, "over_refusal_rate") or 0.0)


def hypervolume_difference(front: Front, reference: Front) -> Mean:
    """Return the difference of two runs' hypervolumes, paired by the tuning seeds that both have."""
    return paired_values(front.hypervolumes, reference.hypervolumes, SHARE)
