"""Compute a cell of a comparison on the testbed: train as the recipe does, and measure the model.

Generation, oracle, GCG and lm-eval are the same code as in users' own evaluations.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.artifacts import package_versions
from sails_align.core.cost import Cost, peak_memory_mb
from sails_align.data.messages import Message, user
from sails_align.data.tokens import tokenize_response
from sails_align.evaluation.backends.hf import HFBackend
from sails_align.evaluation.evaluate import evaluate
from sails_align.evaluation.options import TESTBED_TOKENS
from sails_align.evaluation.records import Sampling
from sails_align.evaluation.result import EvaluationResult
from sails_align.experiments.benches.bench import LEFT_AFTER
from sails_align.experiments.benches.make import bench_of
from sails_align.experiments.plan import Cell
from sails_align.experiments.steps import Steps
from sails_align.experiments.suffixes import with_suffixes
from sails_align.initializers.adapter import AdapterInit
from sails_align.models.load import load_causal_lm, load_tokenizer
from sails_align.models.threads import n_threads
from sails_align.saes.explain import meanings
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource
from sails_align.subspace.basis import Subspace
from sails_align.subspace.concepts import States, concepts, last_token_states, shown
from sails_align.testbed import prompts as requests
from sails_align.testbed.build import Testbed, resolve_testbed
from sails_align.testbed.oracle import OracleJudge
from sails_align.training.callbacks.drift import DriftCallback
from sails_align.training.callbacks.learning_curve import LearningCurveCallback

PROBE_EVERY = 8
"""Training steps between two probes of the safety rate."""
N_PROBED = 64
"""Validation prompts of trained categories in a probe."""
N_EXPLAINED = 256
"""Requests of each side that the features' activations and texts are taken from."""
QUIETLY: dict[str, Any] = {"sampling": Sampling(TESTBED_TOKENS), "progress": False}
QUIET = ("--save_strategy", "no", "--disable_tqdm", "true", "--logging_strategy", "no")


@n_threads(1)
def run_cell(cell: Cell) -> dict[str, Any]:
    """Train and measure, in this process and on one thread. Returns a JSON-able result."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    cost, testbed = Cost(), resolve_testbed(cell.world)
    with tempfile.TemporaryDirectory(prefix="sails-cell-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        trained = TRAINERS[cell.run.trainer](cell, testbed, folder, cost)
        peak = round(peak_memory_mb(), 1)  # of the training
        drift = None if trained.init is None else DriftCallback(trained.init).measure(trained.model)
        model, tokenizer = trained.model, trained.tokenizer
        if isinstance(model, PeftModel):  # unmerged it generates the same texts (test_hf.py), but more slowly
            model = model.merge_and_unload()
        model.eval()
        found = measure(cell, testbed, model, tokenizer, cost)
        if cell.part == "test" and trained.subspace is not None and "features" in trained.subspace.provenance:
            with cost.of("explain"):
                found["features"] = {"drift": drift, **explain(cell, testbed, trained.subspace, model, tokenizer)}
        if cell.part == "test" and cell.measures.relearning:
            with cost.of("relearn"):
                for part in (model, tokenizer):
                    part.save_pretrained(folder / "aligned")
                found["relearned"] = {name: relearn(name, cell, testbed, folder) for name in LEFT_AFTER}
    return {
        "cell": cell.to_json(),
        **found,
        "cost": {
            "seconds": cost.seconds,
            "peak_memory_mb": peak,
            "trainable_parameters": trained.n_trainable,
            "trainable_share": trained.n_trainable / trained.n_parameters,
            "steps_to_95": trained.steps_to_95,
        },
        "versions": package_versions(),
    }


@dataclass(frozen=True)
class Trained:
    """A trained model."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    n_trainable: int = 0
    n_parameters: int = 1
    steps_to_95: int | None = None
    """Steps to a safety rate of 95%, if it was measured and reached."""
    subspace: Subspace | None = None
    init: AdapterInit | None = None


def _untrained(cell: Cell, testbed: Testbed, folder: Path, cost: Cost) -> Trained:
    return Trained(*_load(testbed.model_path))


def _aligned(cell: Cell, testbed: Testbed, folder: Path, cost: Cost) -> Trained:
    """Train by SFT or DPO as `align.run` does, without saving anything."""
    from sails_align.models.parameters import count_parameters
    from sails_align.training import run as align
    from sails_align.training.subspace import find_subspace
    from sails_align.training.trainer import build_trainer

    method = cell.run.trainer
    assert method in ("sft", "dpo")
    with cost.of("prepare"):
        options = ["--model_name_or_path", cell.world, "--output_dir", str(folder), *cell.training_options]
        args = align.parse(method, [*QUIET, *options, *cell.run.options])
        args, _ = align.resolved(args)
        source = align.load_source(args, testbed)
    subspace = None
    if args.sails.uses_subspace:
        with cost.of("subspace"):
            subspace = find_subspace(args, source, folder / "subspace")
    probe = None
    if cell.part == "test":
        probe = LearningCurveCallback(PROBE_EVERY, _probe(cell, testbed, source.tokenizer, cost))
    with cost.of("prepare"):
        built = build_trainer(args, source, subspace, callbacks=[probe] if probe else None)
        trainer, init = built.trainer, built.init
    with cost.of("train"):
        trainer.train()
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    steps_to_95 = None
    if probe:
        steps_to_95 = probe.steps_to("safety_rate", 0.95)
    return Trained(model, source.tokenizer, *count_parameters(model), steps_to_95, subspace, init)


def _reinforced(cell: Cell, testbed: Testbed, folder: Path, cost: Cost) -> Trained:
    """Train the testbed's RLHF reference by its recipe."""
    from sails_align.training.rlhf import run as rlhf

    options = ["--model_name_or_path", cell.world, "--seed", str(cell.seed), "--output_dir", str(folder)]
    with cost.of("train"), contextlib.redirect_stdout(io.StringIO()):
        rlhf.main([*QUIET, *options, "--eval_examples", "1", *cell.run.options])
    model, tokenizer = _load(str(folder))
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Trained(model, tokenizer, n_parameters, n_parameters)


TRAINERS: dict[str, Callable[[Cell, Testbed, Path, Cost], Trained]] = {
    "none": _untrained,
    "sft": _aligned,
    "dpo": _aligned,
    "rlhf": _reinforced,
}


def _load(folder: str) -> tuple[Any, PreTrainedTokenizerBase]:
    return load_causal_lm(folder, dtype=torch.float32), load_tokenizer(folder)


def _probe(
    cell: Cell, testbed: Testbed, tokenizer: PreTrainedTokenizerBase, cost: Cost
) -> Callable[[PreTrainedModel], dict[str, float]]:
    """Return a function that measures the safety rate on validation prompts of trained categories."""
    prompts = requests.request_prompts(testbed, cell.world, N_PROBED, part="validation", seed=1)
    harmful = [prompt for prompt in prompts if prompt.meta["split"] == "harmful"]

    def safety(model: PreTrainedModel) -> dict[str, float]:
        with cost.of("probe"):
            result = evaluate(harmful, HFBackend.of(model, tokenizer), judges(cell, testbed), **QUIETLY)
        return {"safety_rate": result.rates()["safety_rate"].bound_low or 0.0}

    return safety


def judges(cell: Cell, testbed: Testbed) -> dict[str, OracleJudge]:
    """Return the oracle of the cell's world."""
    return {"oracle": OracleJudge({cell.world: testbed.world})}


def measure(cell: Cell, testbed: Testbed, model: Any, tokenizer: PreTrainedTokenizerBase, cost: Cost) -> dict[str, Any]:
    """Measure safety and helpfulness, also by category, success of attacks, and capability."""
    with cost.of("evaluate"):
        result = requests.measure(model, tokenizer, testbed, cell.measures.n_prompts, part=cell.part)
    found: dict[str, Any] = {
        "numbers": {name: value.to_json() for name, value in requests.numbers(result).items()},
        "by_category": by_category(result),
    }
    if cell.part == "test" and cell.measures.n_attacked:
        with cost.of("attack"):
            found["attack"] = attack(cell, testbed, model, tokenizer)
    if cell.part == "test" and cell.measures.n_capability:
        with cost.of("capability"):
            found["capability"] = capability(cell, testbed, model, tokenizer)
    return found


def explain(
    cell: Cell, testbed: Testbed, subspace: Subspace, trained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Describe the features of a subspace on held-out requests, before and after training."""
    base, world = _load(testbed.model_path)[0].eval(), testbed.world
    source = SAESource(path=testbed.sae_path)
    saes = SAESet.load(source, model_config=base.config, model_name=testbed.model_path)

    def asked(*splits: str) -> list[list[Message]]:
        requests = [request for split in splits for request in world.requests(split, N_EXPLAINED // len(splits))]
        return [[user(request.prompt)] for request in requests]

    def states(model: PreTrainedModel) -> tuple[States, States]:
        harmful, harmless = asked("test_harmful", "test_ood"), asked("test_benign", "test_dual_use")
        of = [last_token_states(model, tokenizer, list(saes), requests) for requests in (harmful, harmless)]
        return of[0], of[1]

    rows = [
        request
        for split in ("train_harmful", "train_benign")
        for request in world.requests(split, N_EXPLAINED, seed=cell.seed)
    ]
    texts = [tokenize_response(tokenizer, [user(request.prompt)], request.answer, 64) for request in rows]
    told = meanings(base, tokenizer, saes, shown(subspace), texts)
    found = concepts(subspace, saes, states(base), states(trained))
    return {**found, "meanings": [asdict(meaning) for meaning in told]}


def relearn(attack: str, cell: Cell, testbed: Testbed, folder: Path) -> dict[str, Any]:
    """Measure the model in `aligned` after further training, on half of the test prompts."""
    changed = Steps(cell, bench_of(cell.world), folder, folder).further(folder / "aligned", attack)
    model, tokenizer = _load(str(changed))
    n_prompts = max(1, cell.measures.n_prompts // 2)
    result = requests.measure(model.eval(), tokenizer, testbed, n_prompts, part=cell.part)
    return {measure: value.to_json() for measure, value in requests.numbers(result).items()}


def by_category(result: EvaluationResult) -> dict[str, dict[str, Any]]:
    """Return the safety rate of each harm category, and over-refusal of each harmless one."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for place, prompt in enumerate(result.prompts):
        groups.setdefault((prompt.category, prompt.kind == "harmful"), []).append(place)
    return {
        category: {
            "split": result.prompts[places[0]].meta["split"] if is_harmful else "harmless",
            **result.rates(places)["safety_rate" if is_harmful else "over_refusal_rate"].to_json(),
        }
        for (category, is_harmful), places in sorted(groups.items())
    }


def attack(cell: Cell, testbed: Testbed, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the success of GCG: one search per harmful prompt, with the same budget for every model."""
    n_each = cell.measures.n_attacked // 2
    prompts = requests.request_prompts(testbed, cell.world, n_each, part=cell.part, seed=cell.seed)
    prompts = [prompt for prompt in prompts if prompt.kind == "harmful"]
    attacked = with_suffixes(model, tokenizer, prompts, cell.seed)
    result = evaluate(attacked, HFBackend.of(model, tokenizer), judges(cell, testbed), **QUIETLY)
    return {name: of.to_json() for name, of in result.rates().items() if name.startswith("attack_success_rate")}


def capability(cell: Cell, testbed: Testbed, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Return the accuracy of lm-eval's tasks of the world's facts, by task."""
    from sails_align.evaluation.harness.options import HarnessArguments
    from sails_align.evaluation.harness.run import run_in_memory
    from sails_align.testbed.tasks import GROUP, write_tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="sails-tasks-") as folder:
        write_tasks(testbed.world, Path(folder), n=cell.measures.n_capability)
        result = run_in_memory(model, tokenizer, HarnessArguments([GROUP], batch_size="64"), [folder])
    return {score.task: score.value for score in result.scores}
