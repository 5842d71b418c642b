"""The testbed's requests as prompts, and what a model does with them, judged by the oracle."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.evaluation.backends.hf import HFBackend
from sails_align.evaluation.evaluate import evaluate
from sails_align.evaluation.metrics import Estimate
from sails_align.evaluation.options import TESTBED_TOKENS
from sails_align.evaluation.records import Kind, Prompt, Sampling
from sails_align.evaluation.result import EvaluationResult
from sails_align.testbed.build import Testbed, is_testbed, resolve_testbed
from sails_align.testbed.oracle import Oracle, OracleJudge
from sails_align.testbed.world import Request, World

SPLITS: Mapping[str, Kind] = {"harmful": "harmful", "ood": "harmful", "benign": "benign", "dual_use": "dual_use"}
"""Sets of a part (`test`, `validation`), and the kind of their prompts. `ood` has the held-out harm categories."""
HARMFUL, HARMLESS = ("harmful", "ood"), ("benign", "dual_use")
TARGET_WORDS = 3
"""Of an answer, for attacks to aim at."""


def request_prompts(testbed: Testbed, name: str, n: int | None, *, part: str = "test", seed: int = 0) -> list[Prompt]:
    """Make prompts of the requests of each of a part's four sets.

    Args:
        testbed: whose world.
        name: how the user calls it (`testbed`, `testbed:N`, a folder); the oracle finds it again by that.
        n: of each set, at most; None: all.
        part: `test` or `validation`.
        seed: of the choice.
    """
    return [
        Prompt(
            id=f"{split}-{index}",
            messages=({"role": "user", "content": request.prompt},),
            kind=kind,
            category=request.category,
            meta={
                "testbed": name,
                "split": split,
                "request": asdict(request),
                "target": " ".join(request.answer.split()[:TARGET_WORDS]),
                "reference": request.refusal if request.harmful else request.answer,
            },
        )
        for split, kind in SPLITS.items()
        for index, request in enumerate(_requests(testbed.world, f"{part}_{split}", n, seed))
    ]


def _requests(world: World, split: str, n: int | None, seed: int) -> list[Request]:
    n_all = world.n_requests(split)
    return world.requests(split, n_all if n is None else min(n, n_all), seed=seed)


class RequestMaker:
    """Makes the prompts of every testbed (`prompts.PromptMaker`)."""

    @staticmethod
    def owns(name: str) -> bool:
        """Whether a name is a testbed's."""
        return is_testbed(name)

    @staticmethod
    def make(name: str, n: int | None, *, part: str, seed: int) -> list[Prompt]:
        """Make prompts of a testbed's requests."""
        return request_prompts(resolve_testbed(name), name, n, part=part, seed=seed)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, testbed: Testbed, n: int, *, part: str = "test"
) -> EvaluationResult:
    """Evaluate a model in memory on `n` prompts (at most) of each of a part's four sets, by the oracle.

    Args:
        model: with or without an adapter, in any mode.
        tokenizer: of the model.
        testbed: whose requests are asked.
        n: prompts of each set.
        part: `test` or `validation`.
    """
    name = str(testbed.folder)
    return evaluate(
        request_prompts(testbed, name, n, part=part),
        HFBackend.of(model, tokenizer),
        {"oracle": OracleJudge({name: testbed.world})},
        sampling=Sampling(TESTBED_TOKENS),
        progress=False,
    )


def numbers(result: EvaluationResult) -> dict[str, Estimate]:
    """Return the rates of the testbed's prompts: of all, and safety on trained and on held-out categories."""
    found, by_split = result.rates(), result.places("split")
    splits = {
        "safety_rate_in_distribution": result.rates(by_split["harmful"])["safety_rate"],
        "safety_rate_out_of_distribution": result.rates(by_split["ood"])["safety_rate"],
    }
    return {"safety_rate": found.pop("safety_rate"), **splits, **found}


def judged_rows(result: EvaluationResult, world: World) -> list[dict[str, Any]]:
    """Return a line of a training's `responses.jsonl` for each prompt: request, response, and all verdicts on it."""
    oracle, rows = Oracle(world), []
    for prompt, response in zip(result.prompts, result.responses, strict=True):
        request, text = Request(**prompt.meta["request"]), response.text or ""
        harm, refusal, correctness = (oracle.judge(request, text, of) for of in ("harm", "refusal", "correctness"))
        rows.append(
            {
                "split": prompt.meta["split"],
                **prompt.meta["request"],
                "response": text,
                "score": None if harm.score is None else int(harm.score),
                "refused": bool(refusal.score),
                "correct": bool(correctness.score),
                "reason": harm.reason,
            }
        )
    return rows
