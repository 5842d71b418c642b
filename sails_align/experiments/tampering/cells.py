"""Compute a cell of the tampering study: align, defend, train further, repair, measure.

<models>/shared-<key>/aligned     the aligned model, merged; cells of one run and seed share it
<models>/shared-<key>/unaligned   the aligned model after training on other harmful rows, for methods that need one
<models>/shared-<key>/units       the units of the aligned model, likewise
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sails_align.core.artifacts import package_versions
from sails_align.core.cost import Cost
from sails_align.core.files import write_text
from sails_align.evaluation.backends.make import in_process
from sails_align.evaluation.records import Prompt
from sails_align.experiments.benches.bench import Asked, PromptChange, begun
from sails_align.experiments.benches.make import bench_of
from sails_align.experiments.placeholders import WORLD
from sails_align.experiments.plan import Cell
from sails_align.experiments.steps import Steps, lines
from sails_align.experiments.suffixes import with_suffixes
from sails_align.experiments.tampering.attacks import ATTACKS, Attack
from sails_align.experiments.tampering.defences import (
    ADAPTER,
    ALIGNED,
    DEFENCES,
    HARMLESS_PROMPTS,
    PROMPTS,
    RANDOM_UNITS,
    REFUSAL,
    ROWS,
    UNALIGNED,
    UNITS,
    Defence,
)
from sails_align.experiments.tampering.distance import moved
from sails_align.models.load import load_causal_lm, load_tokenizer
from sails_align.models.resolve import resolve_model
from sails_align.training import run as align
from sails_align.training.units import units_of
from sails_align.units.options import UnitOptions
from sails_align.units.sets import Units

N_PROMPTS = 64
"""Of the alignment data, for methods that look at some."""


def run_tampered(cell: Cell, models: Path) -> dict[str, Any]:
    """Compute a cell in this process. Returns a JSON-able result. Models that cells share are kept in the folder."""
    tampering, cost = cell.run.tampering, Cost()
    assert tampering is not None
    attack, defence = ATTACKS.get(tampering.attack), DEFENCES.get(tampering.defence)
    bench = bench_of(cell.world)
    with tempfile.TemporaryDirectory(prefix="sails-tampering-", ignore_cleanup_errors=True) as temporary:
        work = TamperingSteps(cell, bench, models, Path(temporary), attack, defence)
        with cost.of("align"):
            model = work.aligned
        with cost.of("before"):
            model = work.edited(model, defence.before, "before")
        if defence.is_trained:
            with cost.of("train"):
                model = work.attacked(model)
        with cost.of("after"):
            model = work.edited(model, defence.after, "after")
        distance = moved(model, work.aligned)
        with cost.of("evaluate"):
            backend = in_process(resolve_model(str(model)), "hf", bench.batch_size)
            numbers = bench.measure(backend, Asked(cell.part, attack.learned, work.change(model)))
    return {
        "cell": cell.to_json(),
        "tampering": asdict(tampering),
        "numbers": numbers,
        "moved": distance,
        "by_category": {},
        "cost": {"seconds": cost.seconds, "steps_to_95": None, "peak_memory_mb": None},
        "versions": package_versions(),
    }


@dataclass(frozen=True)
class TamperingSteps(Steps):
    """The steps of a cell."""

    attack: Attack
    defence: Defence

    def values(self) -> dict[str, Callable[[], Any]]:
        return {
            **super().values(),
            ALIGNED: lambda: self.aligned,
            UNALIGNED: lambda: self._once("unaligned", self._unalign),
            ROWS: lambda: self.folder / "rows.jsonl",
            PROMPTS: lambda: self._prompts("safety"),
            HARMLESS_PROMPTS: lambda: self._prompts("other_benign"),
            UNITS: lambda: self._once("units", self._find_units),
            RANDOM_UNITS: self._random_units,
            REFUSAL: lambda: self.bench.refusal,
        }

    @property
    def aligned(self) -> Path:
        """The aligned model: trained with the run's own learning rate and the defence's options, and merged."""
        return self._once("aligned", lambda folder: self.align(self._alignment, folder))

    @property
    def _alignment(self) -> tuple[str, ...]:
        return (*self.cell.run.options, *(self.filled(word) for word in self.defence.aligning))

    def _once(self, name: str, make: Callable[[Path], object], *decides: Any) -> Path:
        run = self.cell.run
        of_run = (run.trainer, self._alignment, run.files_sha256, self.cell.training_options)
        return self.once(name, make, *of_run, *decides)

    def _unalign(self, folder: Path) -> None:
        harmful = ATTACKS.get("harmful")
        rows = self.bench.rows("other_harmful", harmful.harmful, self.cell.seed)
        self.train(self.aligned, rows, harmful.epochs, self.bench.learning_rate, [], folder)

    def attacked(self, model: Path) -> Path:
        """Edit the model, or train it on the attack's rows, with what the defence changes.

        Attacks on prompts or on the beginning of answers leave it as it is.
        """
        if self.attack.edit:
            data = {"dataset_name": WORLD, "helpful_dataset_name": WORLD}
            return self.edited(model, {self.attack.edit: data}, "attack")
        attack, defence, knob = self.attack, self.defence, self.cell.learning_rate
        if not attack.trains:
            return model
        rows = self.attack_rows(attack)
        if defence.adds_safety_rows:
            rows += self.bench.rows("safety", round(knob or 0), self.cell.seed)
        rate = self.bench.learning_rate * (defence.rate or knob or 1.0)
        write_text(self.folder / "rows.jsonl", lines(rows))
        options = [self.filled(word) for word in defence.training]
        if attack.is_lora and "--use_peft" not in options:
            options += ADAPTER
        if "--use_peft" in options:
            rate *= 10

        def train(folder: Path) -> None:
            self.train(model, rows, attack.epochs, rate, options, folder)

        if defence.leaves_training_alone:
            return self._once("attacked", train, asdict(attack))
        train(self.folder / "trained")
        return self.folder / "trained"

    def change(self, model: Path) -> PromptChange | None:
        """Return what the attack makes of harmful prompts; None: nothing."""
        attack = self.attack
        if not self.defence.is_trained:
            return None
        if attack.prefill:
            return partial(begun, n_words=attack.prefill)
        return partial(self._with_suffixes, model) if attack.gcg else None

    def _with_suffixes(self, model: Path, harmful: list[Prompt]) -> list[Prompt]:
        """Add adversarial suffixes to the first prompts of each set, and leave out the others."""
        by_split: dict[str, list[Prompt]] = {}
        for prompt in harmful:
            by_split.setdefault(prompt.meta["split"], []).append(prompt)
        attacked = [prompt for of_split in by_split.values() for prompt in of_split[: self.attack.gcg]]
        return with_suffixes(load_causal_lm(str(model)), load_tokenizer(str(model)), attacked, self.cell.seed)

    def _prompts(self, source: str) -> Path:
        """Write harmful or harmless prompts of the alignment data, as many of both."""
        path = self.folder / f"{source}-prompts.jsonl"
        n = len(self.bench.rows("safety", N_PROMPTS, self.cell.seed))
        prompts = [row["prompt"][0]["content"] for row in self.bench.rows(source, n, self.cell.seed)]
        write_text(path, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        return path

    def _find_units(self, folder: Path) -> None:
        safety, benign = self.folder / "safety.jsonl", self.folder / "benign.jsonl"
        write_text(safety, lines(self.bench.rows("safety", N_PROMPTS, self.cell.seed)))
        write_text(benign, lines(self.bench.rows("other_benign", N_PROMPTS, self.cell.seed)))
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
