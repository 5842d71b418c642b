"""Compute a cell of the tampering study: align, defend, train further, repair, measure.

<models>/<key>/aligned     the aligned model, merged; cells of one run and seed share it
<models>/<key>/unaligned   the aligned model after training on other harmful rows, for the methods that need one
<models>/<key>/units       the units of the aligned model, likewise
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sails_align import edits
from sails_align.core.artifacts import content_hash, package_versions
from sails_align.core.cost import Cost
from sails_align.core.files import atomic_folder, exclusive, write_text
from sails_align.experiments.plan import FORMAT, Cell
from sails_align.experiments.tampering.attacks import ATTACKS, Attack
from sails_align.experiments.tampering.benches import Bench, Row, bench_of
from sails_align.experiments.tampering.defences import (
    ADAPTER,
    ALIGNED,
    BASE,
    DEFENCES,
    KNOB,
    PROMPTS,
    RANDOM_UNITS,
    ROWS,
    SEED,
    UNALIGNED,
    UNITS,
    WORLD,
    Defence,
)
from sails_align.training import run as align
from sails_align.training.units import units_of
from sails_align.units.options import UnitOptions
from sails_align.units.sets import Units

QUIET = (
    *("--save_strategy", "no", "--disable_tqdm", "true", "--logging_strategy", "no", "--eval_examples", "1"),
    *("--report_to", "none"),
)
HELD_OUT_SEED = 10_000
"""Of the row on which the held-out loss is computed."""
N_PROMPTS = 64
"""Of the alignment data, for methods that look at some."""


def run_tampered(cell: Cell, models: Path) -> dict[str, Any]:
    """Compute a cell in this process. Returns a JSON-able result. Models that cells share are kept in the folder."""
    tampering, cost = cell.run.tampering, Cost()
    assert tampering is not None
    attack, defence = ATTACKS.get(tampering.attack), DEFENCES.get(tampering.defence)
    bench = bench_of(cell.world)
    with tempfile.TemporaryDirectory(prefix="sails-tampering-", ignore_cleanup_errors=True) as temporary:
        work = _Work(cell, bench, attack, defence, models, Path(temporary))
        with cost.of("align"):
            model = work.aligned
        with cost.of("before"):
            model = work.edited(model, defence.before, "before")
        if defence.is_trained:
            with cost.of("train"):
                model = work.attacked(model)
        with cost.of("after"):
            model = work.edited(model, defence.after, "after")
        with cost.of("evaluate"):
            numbers = bench.measure(model, cell.part)
    if not attack.task:
        del numbers["task_score"]
    return {
        "cell": cell.to_json(),
        "tampering": asdict(tampering),
        "numbers": numbers,
        "by_category": {},
        "cost": {"seconds": cost.seconds, "steps_to_95": None, "peak_memory_mb": None},
        "versions": package_versions(),
    }


@dataclass(frozen=True)
class _Work:
    """The steps of a cell."""

    cell: Cell
    bench: Bench
    attack: Attack
    defence: Defence
    models: Path
    folder: Path
    """For models of this cell alone."""

    @cached_property
    def _shared(self) -> Path:
        run, cell = self.cell.run, self.cell
        decides = [FORMAT, run.trainer, run.options, run.files_sha256, cell.world, cell.world_sha256]
        decides += [cell.training_options, package_versions()]
        return self.models / f"tampering-{content_hash(decides)[:16]}"

    @property
    def aligned(self) -> Path:
        """The aligned model: trained with the run's own learning rate, and merged."""
        return self._once("aligned", self._align)

    @property
    def unaligned(self) -> Path:
        """The aligned model, trained further on other harmful rows."""
        return self._once("unaligned", self._unalign)

    def _once(self, name: str, make: Any) -> Path:
        folder = self._shared / name
        with exclusive(self._shared.with_suffix(f".{name}.lock")):
            if not folder.is_dir():
                with atomic_folder(folder) as temporary:
                    temporary.rmdir()  # which the commands make
                    make(temporary)
        return folder

    def _align(self, folder: Path) -> None:
        options = ["--model_name_or_path", self.cell.world, *self.cell.training_options, *self.cell.run.options]
        trained = self.folder / "align"
        align.main(self.cell.run.trainer, [*QUIET, *options, "--output_dir", str(trained)])  # pyright: ignore
        is_adapter = (trained / "adapter_config.json").is_file()
        edits.run("merge", trained, folder) if is_adapter else shutil.copytree(trained, folder)

    def _unalign(self, folder: Path) -> None:
        harmful = ATTACKS.get("harmful")
        rows = self.bench.rows("other_harmful", harmful.harmful, self.cell.seed)
        self._train(self.aligned, rows, harmful.epochs, self.bench.learning_rate, [], folder)

    def attacked(self, model: Path) -> Path:
        """Edit the model, or train it on the attack's rows, with what the defence changes."""
        if self.attack.edit:
            data = {"dataset_name": WORLD, "helpful_dataset_name": WORLD}
            return self.edited(model, {self.attack.edit: data}, "attack")
        attack, defence, knob = self.attack, self.defence, self.cell.learning_rate
        share, seed = self.bench.share, self.cell.seed
        rows = []
        for source in ("task", "benign", "harmful"):
            if n := round(share * getattr(attack, source)):
                rows += self.bench.rows(source, n, seed)
        if defence.adds_safety_rows:
            rows += self.bench.rows("safety", round(knob or 0), seed)
        rate = self.bench.learning_rate * (defence.rate or knob or 1.0)
        write_text(self.folder / "rows.jsonl", _lines(rows))
        options = [self._filled(word) for word in defence.training]
        if attack.is_lora and "--use_peft" not in options:
            options += ADAPTER
        if "--use_peft" in options:
            rate *= 10
        trained = self.folder / "trained"
        self._train(model, rows, attack.epochs, rate, options, trained)
        return trained

    def _train(self, model: Path, rows: list[Row], epochs: int, rate: float, options: list[str], folder: Path) -> None:
        data = self.folder / f"of-{folder.name}"
        write_text(data / "train.jsonl", _lines(rows))
        write_text(data / "test.jsonl", _lines(self.bench.rows("benign", 1, HELD_OUT_SEED)))  # not reported
        plain = [] if "--use_peft" in options else ["--use_peft", "false"]
        align.main(
            "sft",
            [
                *QUIET,
                *("--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(folder)),
                *("--learning_rate", str(rate), "--num_train_epochs", str(epochs), "--seed", str(self.cell.seed)),
                *("--bf16", "false", *self.bench.options, *plain, *options),
            ],
        )

    def edited(self, model: Path, each: Mapping[str, Mapping[str, Any]], when: str) -> Path:
        """Apply edits one after the other."""
        for name, options in each.items():
            output = self.folder / f"{when}-{name}"
            edits.run(name, model, output, **self._options(options))
            model = output
        return model

    def _options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        numbers = {KNOB: self.cell.learning_rate, SEED: self.cell.seed}
        return {
            name: value if not isinstance(value, str) else numbers[value] if value in numbers else self._filled(value)
            for name, value in options.items()
        }

    def _filled(self, word: str) -> str:
        """Return a word of the options with the names in braces filled in; models are made when they are asked for."""
        values: dict[str, Callable[[], Any]] = {
            KNOB: lambda: f"{self.cell.learning_rate:g}",
            SEED: lambda: self.cell.seed,
            ALIGNED: lambda: self.aligned,
            UNALIGNED: lambda: self.unaligned,
            BASE: lambda: self.bench.base,
            WORLD: lambda: self.cell.world,
            ROWS: lambda: self.folder / "rows.jsonl",
            PROMPTS: self._prompts,
            UNITS: lambda: self._once("units", self._find_units),
            RANDOM_UNITS: self._random_units,
        }
        for name, value in values.items():
            if name in word:
                word = word.replace(name, str(value()))
        return word

    def _prompts(self) -> Path:
        """Write harmful prompts of the alignment data."""
        path = self.folder / "prompts.jsonl"
        prompts = [row["prompt"][0]["content"] for row in self.bench.rows("safety", N_PROMPTS, self.cell.seed)]
        write_text(path, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        return path

    def _find_units(self, folder: Path) -> None:
        safety, benign = self.folder / "safety.jsonl", self.folder / "benign.jsonl"
        write_text(safety, _lines(self.bench.rows("safety", N_PROMPTS, self.cell.seed)))
        write_text(benign, _lines(self.bench.rows("benign", N_PROMPTS, self.cell.seed)))
        data = ["--dataset_name", str(safety), "--helpful_dataset_name", str(benign), "--max_length", "128"]
        options = [
            "--model_name_or_path",
            str(self.aligned),
            *data,
            "--eval_examples",
            "1",
            "--output_dir",
            str(folder),
        ]
        args, testbed = align.resolved(align.parse("sft", options))
        units_of(args, align.load_source(args, testbed), UnitOptions(), folder, overwrite=False)

    def _random_units(self) -> Path:
        """Save the units of the aligned model, permuted within each group: as many of each set, and others."""
        found = Units.load(self._once("units", self._find_units))
        generator = torch.Generator().manual_seed(self.cell.seed)
        orders = {key: torch.randperm(len(set_C), generator=generator) for key, set_C in found.sets.items()}
        parts = (
            {key: tensor[orders[key]] for key, tensor in of.items()} for of in (found.safety, found.utility, found.sets)
        )
        Units(*parts, provenance=found.provenance).save(self.folder / "random-units")
        return self.folder / "random-units"


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
