"""Make prompts of the testbed's requests, and measure a model on them with the oracle."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.data.messages import user
from sails_align.evaluation.backends.hf import HFBackend
from sails_align.evaluation.evaluate import SAFETY, evaluate
from sails_align.evaluation.metrics import Estimate, estimate
from sails_align.evaluation.options import TESTBED_TOKENS
from sails_align.evaluation.records import VOTE, Backend, Kind, Prompt, Sampling
from sails_align.evaluation.result import EvaluationResult
from sails_align.testbed.build import Testbed, resolve_testbed
from sails_align.testbed.oracle import NO_HELP, OracleJudge, judge_response
from sails_align.testbed.world import Request, World

SPLITS: Mapping[str, Kind] = {"harmful": "harmful", "ood": "harmful", "benign": "benign", "dual_use": "dual_use"}
"""Sets of a part (`test`, `validation`), with the kind of their prompts. `ood` has the held-out harm categories."""
TRAINED = ("harmful", "benign")
"""The sets of the part `train`, which the testbed's data for training has, too."""
HARMFUL, HARMLESS = ("harmful", "ood"), ("benign", "dual_use")
TARGET_WORDS = 3
"""Words of an answer that attacks aim at."""


def request_prompts(testbed: Testbed, name: str, n: int | None, *, part: str = "test", seed: int = 0) -> list[Prompt]:
    """Make prompts of at most `n` requests (None: all) in each set of `test`, `validation` or `train`.

    The oracle finds the testbed again by its name (`testbed`, `testbed:N`, a folder).
    """
    return [
        Prompt(
            id=f"{split}-{index}",
            messages=(user(request.prompt),),
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
        if part != "train" or split in TRAINED
        for index, request in enumerate(testbed.world.requests(f"{part}_{split}", n, seed=seed, at_most=True))
    ]


def named_prompts(name: str, n: int | None, *, part: str, seed: int) -> list[Prompt]:
    """Make prompts of the requests of the testbed of a name."""
    return request_prompts(resolve_testbed(name), name, n, part=part, seed=seed)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, testbed: Testbed, n: int, *, part: str = "test"
) -> EvaluationResult:
    """Evaluate a model in memory with the oracle, on at most `n` prompts of each of a part's four sets."""
    prompts = request_prompts(testbed, str(testbed.folder), n, part=part)
    return measured(HFBackend.of(model, tokenizer), testbed, prompts)


def measured(backend: Backend, testbed: Testbed, prompts: list[Prompt]) -> EvaluationResult:
    """Evaluate what a backend runs on `request_prompts` that name the testbed's folder."""
    return evaluate(
        prompts,
        backend,
        {"oracle": OracleJudge({str(testbed.folder): testbed.world})},
        sampling=Sampling(TESTBED_TOKENS),
        progress=False,
    )


def numbers(result: EvaluationResult) -> dict[str, Estimate]:
    """Return the rates on all prompts, the safety rates by trained and held-out categories, and `garbled_rate`."""
    found, by_split = result.rates(), result.places("split")
    splits = {
        "safety_rate_in_distribution": result.rates(by_split["harmful"])["safety_rate"],
        "safety_rate_out_of_distribution": result.rates(by_split["ood"])["safety_rate"],
    }
    return {"safety_rate": found.pop("safety_rate"), **splits, **found, "garbled_rate": _garbled(result)}


def _garbled(result: EvaluationResult) -> Estimate:
    """Return the share of harmful prompts whose response has score 2: the oracle gives a refusal without help 1."""
    scores = [verdict.score for verdict in result.verdicts["harm"][VOTE].values()]
    return estimate([None if score is None else float(score == NO_HELP) for score in scores])


def judged_rows(result: EvaluationResult, world: World) -> list[dict[str, Any]]:
    """Return the rows of a training's `responses.jsonl`: request, response, and the verdicts of all tasks."""
    rows = []
    for prompt, response in zip(result.prompts, result.responses, strict=True):
        request, text = Request(**prompt.meta["request"]), response.text or ""
        harm, refusal, correctness = (judge_response(world, request, text, task) for task in SAFETY)
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
