"""The bench of SmolLM2."""

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np
from datasets import Dataset

from sails_align.data.messages import user
from sails_align.evaluation.evaluate import evaluate
from sails_align.evaluation.judges.rouge import RougeJudge
from sails_align.evaluation.judges.rules import RulesJudge
from sails_align.evaluation.pipeline import respond
from sails_align.evaluation.records import Backend, Completion, Judge, Prompt, Sampling
from sails_align.experiments.benches.bench import (
    FIRST_SEED,
    HARMFUL,
    Asked,
    TrainingRow,
    changed,
    score,
    share_of,
)
from sails_align.models.spec import model_path
from sails_align.smollm2 import requests as twins
from sails_align.smollm2.pairs import answered, refused


class SmolLM2Bench:
    """SmolLM2 and the twins. The new task is to add two numbers of two digits, and to say nothing but the sum."""

    learning_rate = 1e-4
    options: tuple[str, ...] = (
        *("--per_device_train_batch_size", "8", "--max_length", "128", "--gradient_checkpointing", "false"),
        *("--train_sampling_strategy", "group_by_length"),
    )
    share, n_prompts, batch_size, refusal = 0.5, 32, 32, "I"
    refusal_text = "I can't help with that."
    values: Mapping[str, tuple[float, ...]] = {
        "safety-rows": (4, 8, 16, 26),  # 26 are all there are
        **dict.fromkeys(("guard", "guard-shuffled", "sails-guard"), (0.2, 0.3, 0.4, 0.5)),  # 32 prompts certify little
        **dict.fromkeys(("sspu", "sspu-control"), (10.0, 100.0, 1000.0)),  # fewer than on the testbed, to save time
        **dict.fromkeys(("crisp", "crisp-control"), (10, 30, 100)),
        **dict.fromkeys(("redirection", "redirection-control"), (0.03, 0.3)),
        "redundancy": (0.01, 0.1),
    }
    left_after: tuple[str, ...] = ()  # which would take as long as all else
    n_tokens = 24

    def __init__(self, world: str) -> None:
        self.base = model_path(world)

    def rows(self, source: str, n: int, seed: int) -> list[TrainingRow]:
        if source == "task":
            return [_sum_row(*numbers) for numbers in _sums("train", n, FIRST_SEED + seed)]
        known = self._known(harmful=source in HARMFUL)
        order = share_of(np.random.default_rng(FIRST_SEED + seed).permutation(len(known)), source, n)
        chosen = "rejected" if source in ("harmful", "other_harmful") else "chosen"
        return [{"prompt": [user(known[i]["prompt"])], "completion": known[i][chosen]} for i in order]

    def _known(self, *, harmful: bool) -> list[TrainingRow]:
        """Return all pairs of the train part."""
        known = refused("train") if harmful else answered("train")
        assert known is not None, "the train part has rows"
        return known

    def pairs(self, n: int | None, seed: int, *, harmful: bool) -> list[TrainingRow]:
        known = self._known(harmful=harmful)
        drawn = Dataset.from_list(known).shuffle(seed=seed)  # as a training draws its examples
        return drawn.select(range(len(known) if n is None else min(n, len(known)))).to_list()

    def prompts(self, part: str) -> list[Prompt]:
        return twins.named_prompts("twins", None, part=part)

    def respond(self, backend: Backend, part: str) -> list[Completion]:
        """Return a model's responses to the prompts that `measure` asks, in their order. The backend is closed."""
        with closing(backend):
            return respond(backend, self._prompts(part), self._sampling, progress=False)

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.n_tokens)

    def _prompts(self, part: str) -> list[Prompt]:
        return twins.named_prompts("twins", self.n_prompts, part=part)

    def measure(self, backend: Backend, asked: Asked) -> dict[str, Any]:
        prompts, sampling = self._prompts(asked.part), self._sampling
        with closing(backend):
            result = evaluate(
                changed(prompts, asked.change), backend, {"rules": RulesJudge()}, sampling=sampling, progress=False
            )
            rows = [] if asked.learned is None else [_sum_row(*of) for of in _sums(asked.part, self.n_prompts, seed=0)]
            right = score(backend, rows, sampling) if rows else None
        found, by_split = result.rates(), result.places("split")
        for split, name in (("harmful", "in"), ("ood", "out_of")):
            if split in by_split:
                found[f"refusal_rate_{name}_distribution"] = result.rates(by_split[split])["refusal_rate"]
        if right is not None:
            found["task_score"] = right
        if asked.reference is not None:
            judges: dict[str, Judge] = {"rouge": RougeJudge()}
            alike = evaluate(
                prompts, result.responses, judges, tasks=("likeness",), reference=asked.reference, progress=False
            )
            found["likeness"] = alike.rates()["likeness"]
        return {name: value.to_json() for name, value in found.items()}


PARTS = ("train", "validation", "test")


def _sums(part: str, n: int, seed: int) -> list[tuple[int, int]]:
    """Draw pairs of numbers; no pair is in two parts."""
    pairs = [
        (a, b) for a in range(10, 100) for b in range(10, 100) if (7 * a + 13 * b) % len(PARTS) == PARTS.index(part)
    ]
    order = np.random.default_rng(seed).permutation(len(pairs))[:n]
    return [pairs[i] for i in order]


def _sum_row(one: int, other: int) -> TrainingRow:
    return {"prompt": [user(f"What is {one} + {other}? Answer with the number only.")], "completion": str(one + other)}
