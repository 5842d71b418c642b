"""Compute a cell of the study of systems: train, edit, measure, and train further to see what safety is left."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import package_versions
from sails_align.core.cost import Cost
from sails_align.evaluation.backends.make import in_process
from sails_align.evaluation.output import METRICS_FILE
from sails_align.evaluation.records import Backend
from sails_align.experiments.plan import Cell
from sails_align.experiments.steps import Steps
from sails_align.experiments.systems.entries import SYSTEMS, System
from sails_align.experiments.tampering.attacks import ATTACKS
from sails_align.experiments.tampering.benches import bench_of
from sails_align.models.resolve import resolve_model
from sails_align.steering import hook_of
from sails_align.steering.options import SteeringOptions

LEFT_AFTER = ("benign", "harmful")
"""Further trainings."""


def run_system(cell: Cell, models: Path) -> dict[str, Any]:
    """Compute a cell in this process. Returns a JSON-able result. What cells share is kept in the folder."""
    system, cost, bench = SYSTEMS.get(cell.run.system), Cost(), bench_of(cell.world)
    with tempfile.TemporaryDirectory(prefix="sails-system-", ignore_cleanup_errors=True) as temporary:
        work = _Work(cell, bench, models, Path(temporary), system)
        with cost.of("train"):
            model, trained = work.made()
        with cost.of("evaluate"):
            numbers = bench.measure(work.backend(model), cell.part)
        left = {}
        if cell.part == "test" and system.is_of_weights:
            with cost.of("relearn"):
                left = {name: bench.measure(work.backend(work.further(model, name)), cell.part) for name in LEFT_AFTER}
    for found in (numbers, *left.values()):
        del found["task_score"]  # there is no new task
    return {
        "cell": cell.to_json(),
        "system": cell.run.system,
        "numbers": numbers,
        "relearned": left,
        "by_category": {},
        "cost": {"steps_to_95": None, "peak_memory_mb": None, **trained, "seconds": cost.seconds},
        "versions": package_versions(),
    }


@dataclass(frozen=True)
class _Work(Steps):
    """The steps of a cell."""

    system: System

    def values(self) -> dict[str, Callable[[], Any]]:
        return super().values()

    def made(self) -> tuple[Path, dict[str, Any]]:
        """Return the system's model, and what its training cost."""
        model, cost = Path(self.bench.base), {"trainable_parameters": 0, "trainable_share": 0.0}
        if self.system.trainer != "none":
            model = self.folder / "model"
            trained = self.align([self.filled(word) for word in self.system.training], model)
            cost = json.loads((trained / METRICS_FILE).read_text(encoding="utf-8"))["cost"]
        return self.edited(model, self.system.edits, "edit"), cost

    def further(self, model: Path, name: str) -> Path:
        """Train the model further, as an attack of the tampering study does."""
        attack, folder = ATTACKS.get(name), self.folder / f"after-{name}"
        self.train(model, self.attack_rows(attack), attack.epochs, self.bench.learning_rate, [], folder)
        return folder

    def backend(self, model: Path) -> Backend:
        """Return what runs a model, with the system's steering."""
        steering = {name: self.value(value) for name, value in self.system.steering.items()}
        return in_process(
            resolve_model(str(model)), "hf", self.bench.batch_size, hook=hook_of(SteeringOptions(**steering))
        )
