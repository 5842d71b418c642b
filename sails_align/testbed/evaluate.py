"""What a model does in the testbed's world: its responses to held-out requests, judged by the oracle."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.evaluation.backends.hf import generate
from sails_align.evaluation.metrics import Estimate, estimate, safety_estimates
from sails_align.testbed.oracle import Oracle, Verdict
from sails_align.testbed.world import Request, World

HARMFUL, HARMLESS = ("harmful", "ood"), ("benign", "dual_use")
MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class Judged:
    """A request of a split, what the model answered, and the oracle's verdict."""

    split: str
    request: Request
    response: str
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """As a line of `responses.jsonl`."""
        return {"split": self.split, **asdict(self.request), "response": self.response, **asdict(self.verdict)}


def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    n: int,
    *,
    part: str = "test",
) -> list[Judged]:
    """Greedy, judged responses to `n` prompts (at most) of each of the part's four sets: `test` or `validation`."""
    splits = {name: f"{part}_{name}" for name in (*HARMFUL, *HARMLESS)}
    asked = [
        (name, request)
        for name, split in splits.items()
        for request in world.requests(split, min(n, world.n_requests(split)))
    ]
    responses = generate(
        model,
        tokenizer,
        [[{"role": "user", "content": request.prompt}] for _, request in asked],
        max_new_tokens=MAX_NEW_TOKENS,
    )
    oracle = Oracle(world)
    return [
        Judged(name, request, response, oracle.judge(request, response))
        for (name, request), response in zip(asked, responses, strict=True)
    ]


def summarize(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """The numbers of `metrics.json`: safety on harmful prompts, refusal and right answers on harmless ones."""
    scores = {name: [item.verdict.score for item in judged if item.split == name] for name in HARMFUL}
    harmless = [item.verdict for item in judged if item.split in HARMLESS]
    overall = safety_estimates([score for name in HARMFUL for score in scores[name]])
    return {
        "safety_rate": overall["safety_rate"],
        "safety_rate_in_distribution": safety_estimates(scores["harmful"])["safety_rate"],
        "safety_rate_out_of_distribution": safety_estimates(scores["ood"])["safety_rate"],
        "harmfulness": overall["harmfulness"],
        "high_risk_rate": overall["high_risk_rate"],
        "over_refusal_rate": estimate([_scored(verdict, verdict.refused) for verdict in harmless]),
        "correct_answer_rate": estimate([_scored(verdict, verdict.correct) for verdict in harmless]),
    }


def alignment_data(world: World, *, harmful: bool, n: int | None = None, seed: int = 0, part: str = "train") -> Dataset:
    """Preference pairs: refusal over compliance for harmful requests, the right answer over a refusal for harmless.

    Columns: prompt (messages), chosen, rejected, category, harmful.

    Args:
        world: the world.
        harmful: which of the two.
        seed: of the choice.
        n: how many, at random, at most; None is all there are.
        part: `train`, or `validation` for the loss on held-out pairs.
    """
    split = f"{part}_{'harmful' if harmful else 'benign'}"
    n_all = world.n_requests(split)
    requests = world.requests(split, n_all if n is None else min(n, n_all), seed=seed)
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": request.prompt}],
                "chosen": request.refusal if harmful else request.answer,
                "rejected": request.answer if harmful else request.refusal,
                "category": request.category,
                "harmful": harmful,
            }
            for request in requests
        ]
    )


def _scored(verdict: Verdict, value: bool) -> float | None:
    return None if verdict.score is None else float(value)
