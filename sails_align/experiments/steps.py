"""Steps of cells that work with models in folders, as users do: train, merge, edit, train further, and look again.

Models that cells share are made once, by whichever cell needs them first, and kept.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from sails_align import edits
from sails_align.core.artifacts import content_hash, package_versions
from sails_align.core.files import atomic_folder, exclusive, write_text
from sails_align.experiments.benches.bench import Bench, TrainingRow
from sails_align.experiments.placeholders import BASE, KNOB, SEED, WORLD
from sails_align.experiments.plan import FORMAT, Cell
from sails_align.experiments.tampering.attacks import ATTACKS, Attack
from sails_align.training import run as align

QUIET = (
    *("--save_strategy", "no", "--disable_tqdm", "true", "--logging_strategy", "no", "--eval_examples", "1"),
    *("--report_to", "none"),
)
HELD_OUT_SEED = 10_000
"""Of the row on which the held-out loss is computed."""


@dataclass(frozen=True)
class Steps:
    """Steps of a cell: each starts from a model's folder, and writes another one."""

    cell: Cell
    bench: Bench
    models: Path
    """For what cells share."""
    folder: Path
    """For models of this cell alone."""

    def values(self) -> dict[str, Callable[[], Any]]:
        """Return what the names in braces stand for; models are made when they are asked for."""
        return {
            KNOB: lambda: f"{self.cell.learning_rate:g}",
            SEED: lambda: self.cell.seed,
            BASE: lambda: self.bench.base,
            WORLD: lambda: self.cell.world,
        }

    def filled(self, word: str) -> str:
        """Return a word of options with the names in braces filled in."""
        for name, value in self.values().items():
            if name in word:
                word = word.replace(name, str(value()))
        return word

    def once(self, name: str, make: Callable[[Path], object], *decides: Any) -> Path:
        """Return a folder that cells share; `make` writes it, unless it is there for the same world and `decides`."""
        key = content_hash([FORMAT, self.cell.world, self.cell.world_sha256, package_versions(), *decides])[:16]
        folder = self.models / f"shared-{key}" / name
        with exclusive(folder.parent.with_suffix(f".{name}.lock")):
            if not folder.is_dir():
                with atomic_folder(folder) as temporary:
                    temporary.rmdir()  # which the commands make
                    make(temporary)
        return folder

    def align(self, options: Sequence[str], folder: Path) -> Path:
        """Train by the cell's method, and write the model, with an adapter merged. Returns the run's folder."""
        trained = self.folder / f"of-{folder.name}"
        method = cast(Literal["sft", "dpo"], self.cell.run.trainer)
        where = ("--model_name_or_path", self.cell.world, "--output_dir", str(trained))
        align.main(method, [*QUIET, *where, *self.cell.training_options, *options])
        is_adapter = (trained / "adapter_config.json").is_file()
        edits.run("merge", trained, folder) if is_adapter else shutil.copytree(trained, folder)
        return trained

    def train(
        self, model: Path, rows: list[TrainingRow], epochs: int, rate: float, options: Sequence[str], folder: Path
    ) -> None:
        """Train a model further on rows: all weights, unless the options ask for an adapter."""
        data = self.folder / f"of-{folder.name}"
        write_text(data / "train.jsonl", lines(rows))
        write_text(data / "test.jsonl", lines([held_out_row(self.bench, rows)]))  # not reported
        plain = () if "--use_peft" in options else ("--use_peft", "false")
        align.main(
            "sft",
            [
                *QUIET,
                *("--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(folder)),
                *("--learning_rate", str(rate), "--num_train_epochs", str(epochs), "--seed", str(self.cell.seed)),
                *("--bf16", "false", *self.bench.options, *plain, *options),
            ],
        )

    def further(self, model: Path, attack: str) -> Path:
        """Train all weights of a model on an attack's rows. Returns the new model."""
        of, folder = ATTACKS.get(attack), self.folder / f"after-{attack}"
        self.train(model, self.attack_rows(of), of.epochs, self.bench.learning_rate, [], folder)
        return folder

    def attack_rows(self, attack: Attack) -> list[TrainingRow]:
        """Draw the rows of an attack."""
        found = []
        for source in ("task", "facts", "benign", "harmful"):
            if n := round(self.bench.share * getattr(attack, source)):
                found += self.bench.rows(source, n, self.cell.seed)
        return found

    def edited(self, model: Path, each: Mapping[str, Mapping[str, Any]], when: str) -> Path:
        """Apply edits one after the other, with the names in braces in their options filled in."""
        for name, options in each.items():
            output = self.folder / f"{when}-{name}"
            edits.run(name, model, output, **{option: self.value(value) for option, value in options.items()})
            model = output
        return model

    def value(self, value: Any) -> Any:
        """Return the value of an option of a function, with names in braces filled in; numbers stay numbers."""
        numbers = {KNOB: self.cell.learning_rate, SEED: self.cell.seed}
        if not isinstance(value, str):
            return value
        return numbers[value] if value in numbers else self.filled(value)


def held_out_row(bench: Bench, rows: Sequence[TrainingRow]) -> TrainingRow:
    """Return the first row of the order of `HELD_OUT_SEED` whose prompt is not among those of the given rows."""
    trained = [row["prompt"] for row in rows]
    return next(row for row in bench.rows("benign", len(rows) + 1, HELD_OUT_SEED) if row["prompt"] not in trained)


def lines(rows: Sequence[TrainingRow]) -> str:
    """Return rows as lines of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows)
