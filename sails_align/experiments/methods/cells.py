"""Compute a cell of the study of methods: train, edit, measure, and train further to see what safety is left."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import package_versions
from sails_align.core.cost import Cost
from sails_align.core.files import write_json, write_text
from sails_align.evaluation.backends.known_classes import known_classes
from sails_align.evaluation.backends.make import in_process
from sails_align.evaluation.output import METRICS_FILE
from sails_align.evaluation.records import Backend, Completion, InferenceHook
from sails_align.experiments.benches.bench import Asked
from sails_align.experiments.benches.make import bench_of
from sails_align.experiments.benches.smollm2 import SmolLM2Bench
from sails_align.experiments.methods.entries import (
    GUARD,
    METHODS,
    PUBLIC,
    RANDOM_SUBSPACE,
    REFUSAL_TEXT,
    REFUSALS,
    SAES,
    SAILS,
    SUBSPACE,
    ComparedMethod,
)
from sails_align.experiments.plan import Cell
from sails_align.experiments.steps import Steps, lines
from sails_align.guards.calibrate import calibrate_guard
from sails_align.guards.fit import fit_guard
from sails_align.guards.guard import Guard, LoadedModel, ScoredPrompts
from sails_align.guards.options import CalibrationOptions, GuardFitOptions
from sails_align.models.load import load_causal_lm, load_tokenizer
from sails_align.models.resolve import resolve_model
from sails_align.saes.train import train_saes
from sails_align.steering import hook_of
from sails_align.steering.options import SteeringOptions
from sails_align.testbed.build import D_SAE, MODEL_NAME, SAE_LAYERS, SAE_TOKENS, resolve_testbed, sae_rows
from sails_align.testbed.prompts import request_prompts
from sails_align.training import run as align
from sails_align.training.subspace import find_subspace

OTHERS_SEED = 400
"""Of the order of the requests that a cell's method is not trained on."""


def run_method(cell: Cell, models: Path) -> dict[str, Any]:
    """Compute a cell in this process. Returns a JSON-able result. What cells share is kept in the folder."""
    method, cost = METHODS.get(cell.run.name), Cost()
    with tempfile.TemporaryDirectory(prefix="sails-method-", ignore_cleanup_errors=True) as temporary:
        work = MethodSteps(cell, bench_of(cell.world), models, Path(temporary), method)
        with cost.of("train"):
            model, trained = work.made()
        with cost.of("evaluate"):
            numbers = work.measured(model)
        left = {}
        if cell.part == "test" and method.is_of_weights:
            with cost.of("relearn"):
                left = {name: work.measured(work.further(model, name)) for name in work.bench.left_after}
    return {
        "cell": cell.to_json(),
        "method": cell.run.name,
        "numbers": numbers,
        "relearned": left,
        "by_category": {},
        "cost": {"steps_to_95": None, "peak_memory_mb": None, **trained, "seconds": cost.seconds},
        "versions": package_versions(),
    }


@dataclass(frozen=True)
class MethodSteps(Steps):
    """The steps of a cell."""

    method: ComparedMethod

    def values(self) -> dict[str, Callable[[], Any]]:
        return {
            **super().values(),
            GUARD: lambda: self._guard(Path(self.bench.base)),
            SUBSPACE: lambda: self._discovered(*self._rows()),
            RANDOM_SUBSPACE: lambda: self._discovered(*self._rows(), init=("--init", "random_basis")),
            PUBLIC: lambda: self._discovered(*self._rows(of_others=True)),
            REFUSALS: self._refusals,
            REFUSAL_TEXT: lambda: self.bench.refusal_text,
            **{name: partial(self._saes, options) for name, options in SAES.items()},
        }

    def made(self) -> tuple[Path, dict[str, Any]]:
        """Return the method's model, and what its training cost."""
        if self.method.trainer == "none":
            return Path(self.bench.base), {"trainable_parameters": 0, "trainable_share": 0.0}
        model = self.folder / "model"
        trained = self.align([self.filled(word) for word in self.method.training], model)
        return model, json.loads((trained / METRICS_FILE).read_text(encoding="utf-8"))["cost"]

    def backend(self, model: Path) -> Backend:
        """Return what runs a model, with the method's steering and guard."""
        spec = resolve_model(str(model))
        steering = SteeringOptions(**{name: self.value(value) for name, value in self.method.steering.items()})
        guard = Guard.load(self._calibrated(model)) if self.method.guard else None
        hook: InferenceHook | None = hook_of(steering, spec)
        if self.method.knows_categories:
            hook = known_classes(spec, self.bench.prompts(self.cell.part))
        return in_process(spec, "hf", self.bench.batch_size, hook=hook, guard=guard)

    def measured(self, model: Path) -> dict[str, Any]:
        """Measure a model on the cell's part."""
        return self.bench.measure(self.backend(model), Asked(self.cell.part, reference=self._of_base()))

    def _of_base(self) -> list[Completion] | None:
        """Return the base model's responses to the prompts of the cell's part, if models are compared with them."""
        bench, part = self.bench, self.cell.part
        if not isinstance(bench, SmolLM2Bench):
            return None

        def make(folder: Path) -> None:
            base = in_process(resolve_model(bench.base), "hf", bench.batch_size)
            texts = [completion.text for completion in bench.respond(base, part)]
            write_json(folder / "texts.json", {"texts": texts})

        path = self.once(f"base-{part}", make, bench.base) / "texts.json"
        return [Completion(text) for text in json.loads(path.read_text(encoding="utf-8"))["texts"]]

    def _rows(self, *, of_others: bool = False) -> tuple[Path, Path]:
        """Write the harmful and the harmless pairs that the cell's method is trained on, or as many others."""
        n, seed, found = self.cell.measures.n_examples, self.cell.seed, []
        for harmful in (True, False):
            rows = self.bench.pairs(n, seed, harmful=harmful)
            if of_others:
                used, every = [row["prompt"] for row in rows], self.bench.pairs(None, OTHERS_SEED, harmful=harmful)
                rows = [row for row in every if row["prompt"] not in used][: len(rows)]
            found.append(self.folder / f"{'other-' * of_others}{'harmful' if harmful else 'harmless'}.jsonl")
            write_text(found[-1], lines(rows))
        return found[0], found[1]

    def _guard(self, model: Path) -> Path:
        """Fit a guard of a model, on the requests that methods are trained on."""
        folder, (harmful, harmless) = self.folder / "guard", self._rows()
        data = {"dataset_name": str(harmful), "helpful_dataset_name": str(harmless), "data_seed": self.cell.seed}
        control_seed = self.cell.seed if self.method.has_shuffled_labels else None
        fit_guard(model, folder, GuardFitOptions(**data, control_seed=control_seed))
        return folder

    def _calibrated(self, model: Path) -> Path:
        """Calibrate the model's guard on validation prompts."""
        folder = self._guard(model)
        guard, prompts = Guard.load(folder), self.bench.prompts("validation")
        told = [(prompt.messages, prompt.kind == "harmful", prompt.category) for prompt in prompts]
        options = CalibrationOptions(max_pass=float(self.filled(self.method.guard)))
        calibrate_guard(guard, ScoredPrompts.of(guard, LoadedModel.open(str(model)), told), options)
        return folder

    def _discovered(self, harmful: Path, harmless: Path, init: Sequence[str] = SAILS) -> Path:
        """Find a subspace of SAILS in pairs, or make another one."""
        folder = self.folder / f"discovered-{harmful.stem}-{init[-1]}"
        if not folder.is_dir():
            where = (
                "--model_name_or_path",
                self.cell.world,
                "--output_dir",
                str(folder),
                "--seed",
                str(self.cell.seed),
            )
            data = ("--dataset_name", str(harmful), "--helpful_dataset_name", str(harmless), *self.bench.options)
            args, testbed = align.resolved(align.parse("sft", [*where, *data, *init]))
            find_subspace(args, align.load_source(args, testbed), folder / "subspace")
        return folder / "subspace"

    def _saes(self, options: Mapping[str, Any]) -> Path:
        """Train SAEs of the testbed's model on its texts, unless another cell has."""
        testbed = resolve_testbed(self.cell.world)

        def make(folder: Path) -> None:
            model, tokenizer = load_causal_lm(testbed.model_path), load_tokenizer(testbed.model_path)
            asked = [prompt.messages for prompt in request_prompts(testbed, self.cell.world, None, part="train")]
            train_saes(
                model,
                tokenizer,
                sae_rows(testbed.world, tokenizer),
                SAE_LAYERS,
                output_dir=folder,
                model_name=MODEL_NAME,
                d_sae=D_SAE,
                n_tokens=SAE_TOKENS,
                progress=False,
                graph_prompts=asked if "graph_lambda" in options else None,
                **options,
            )

        return self.once("saes", make, dict(options))

    def _refusals(self) -> Path:
        """Write refusals that name what they refuse, for all verbs and objects of the alignment data."""
        path, world = self.folder / "refusals.jsonl", resolve_testbed(self.cell.world).world
        known = sorted({(request.verb, request.thing) for request in world.requests("train_harmful")})
        texts = [f"sorry, i can not help you {verb} the {thing}." for verb, thing in known]
        write_text(path, "".join(json.dumps({"response": text}) + "\n" for text in texts))
        return path
