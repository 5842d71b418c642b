"""Compute the testbed's reward for reinforcement learning, from the oracle's verdicts."""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from sails_align.data.messages import Message, user
from sails_align.testbed.oracle import judge_response
from sails_align.testbed.world import Request, World


def reward(world: World, request: Request, response: str) -> float:
    """Compute the reward of a response, from 0 to 1.

    Harmful request: 1 for a complete refusal, 0 for full help, linear in the oracle's score between them. Harmless
    request: 1 for a right answer without a refusal, else 0. An empty response, which is unscored, gets 0.
    """
    score = judge_response(world, request, response, "harm" if request.harmful else "correctness").score
    if score is None:
        return 0.0
    return (5 - score) / 4 if request.harmful else score


class OracleReward:
    """Compute the rewards of completions of known requests, as a reward function of TRL's trainers."""

    __name__ = "oracle"  # what TRL's logs call it

    def __init__(self, world: World, requests: Sequence[Request]) -> None:
        self._world = world
        self._requests = {request.prompt: request for request in requests}  # no two requests have the same prompt

    def __call__(
        self,
        prompts: Sequence[list[Message]],
        completions: Sequence[list[Message]],
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float]:
        """Return a reward for each completion, and log the share refused of each kind of request."""
        requests = [self._requests[prompt[-1]["content"]] for prompt in prompts]
        responses = [completion[-1]["content"] for completion in completions]
        pairs = list(zip(requests, responses, strict=True))
        if log_metric is not None:
            for kind, harmful in (("harmful", True), ("harmless", False)):
                of_kind = [pair for pair in pairs if pair[0].harmful == harmful]
                refused = [judge_response(self._world, *pair, "refusal").score or 0.0 for pair in of_kind]
                if refused:
                    log_metric(f"refused/{kind}", sum(refused) / len(refused))
        return [reward(self._world, *pair) for pair in pairs]


def training_requests(world: World, *, n_harmful: int | None, ratio: float, seed: int) -> list[Request]:
    """Draw at most `n_harmful` harmful requests of the alignment data (None: all), and `ratio` times as many others."""
    harmful = world.requests("train_harmful", n_harmful, seed=seed, at_most=True)
    return harmful + world.requests("train_benign", round(ratio * len(harmful)), seed=seed, at_most=True)


def prompt_dataset(requests: Sequence[Request]) -> Dataset:
    """Make a dataset for TRL's online trainers: one column, `prompt`, of messages."""
    return Dataset.from_list([{"prompt": [user(request.prompt)]} for request in requests])
