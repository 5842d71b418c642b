"""The transforms `nearest_refusal` and `curriculum`: which refusals requests get, and the order of learning."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from datasets import Dataset

from sails_align.core.errors import InputError
from sails_align.data.messages import Message, user
from sails_align.data.options import CurriculumOptions, MixOptions, NearestRefusalOptions
from sails_align.data.pairs import AlignmentExamples
from sails_align.data.transforms import transformed
from sails_align.data.transforms.nearest_refusal import SIMILARITY, transform

N, POOL, D = 40, 7, 6
HARMFUL = "first you take the lock apart"


class Texts:
    """A reader whose model gives each text a random state of its own, far from the origin as those of real models."""

    def is_refusal(self, response: str) -> bool:
        return response.startswith("no")

    def embed(self, prompts: Sequence[list[Message]], tokens: Literal["all", "last"]) -> torch.Tensor:
        return torch.stack([state(prompt[-1]["content"]) for prompt in prompts])


def state(text: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(text.encode()) * 1000 + len(text))
    return 10 + torch.randn(D, generator=generator, dtype=torch.float64)


def examples(n: int = N) -> AlignmentExamples:
    rows = {"prompt": [[user(f"break {i}")] for i in range(n)], "chosen": [f"no {i % POOL}" for i in range(n)]}
    safety = Dataset.from_dict({**rows, "rejected": [f"yes {i}" for i in range(n)]})
    helpful = Dataset.from_dict({"prompt": [[user(f"mend {i}")] for i in range(n)], "chosen": ["with glue"] * n})
    return AlignmentExamples(safety, helpful, safety, Texts())


def made(given: AlignmentExamples | None = None, **options: Any) -> Any:
    return transform(given or examples(), NearestRefusalOptions(nearest_refusal=True, **options), 0).train


def test_each_target_is_that_of_a_search_through_all_pairs():
    texts = [f"no {i}" for i in range(POOL)]
    requests, pool = (torch.stack([state(text) for text in of]) for of in ([f"break {i}" for i in range(N)], texts))
    requests, pool = requests - requests.mean(0), pool - pool.mean(0)
    rows = made()
    for number, row in enumerate(rows):
        cosines = [float(torch.cosine_similarity(requests[number], each, dim=0)) for each in pool]
        assert row["chosen"] == texts[int(np.argmax(cosines))]
        assert row[SIMILARITY] == pytest.approx(max(cosines), abs=1e-4)
    assert len(set(rows["chosen"])) > 2, "else a stock refusal would do"


def test_prompts_and_rejected_responses_stay_and_discovery_sees_what_is_learned():
    given = examples()
    after = transform(given, NearestRefusalOptions(nearest_refusal=True), 0)
    for column in ("prompt", "rejected"):
        assert after.train[column] == given.safety[column]
    assert after.safety is after.train
    assert after.helpful is given.helpful


def test_harmful_text_is_never_a_target_however_near_it_is():
    given = examples()

    def poisoned(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"chosen": row["prompt"][0]["content"]} if index % 2 else {}

    poisoned_rows = given.safety.map(poisoned, with_indices=True, keep_in_memory=True)
    rows = made(replace(given, safety=poisoned_rows, train=poisoned_rows))
    assert all(row["chosen"].startswith("no") for row in rows)

    class Gullible(Texts):
        def is_refusal(self, response: str) -> bool:
            return True

    rows = made(replace(given, safety=poisoned_rows, train=poisoned_rows, reader=Gullible()))
    assert any(row["chosen"].startswith("break") for row in rows), "control: without the filter it would be"


def test_a_pool_without_refusals_is_refused(tmp_path: Path):
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps({"response": HARMFUL}) + "\n")
    with pytest.raises(InputError, match=r"none of the 1 responses of .*pool.jsonl is a refusal .*;\n.*FILE"):
        made(refusal_dataset_name=str(path))


@pytest.mark.parametrize("with_prompts", [False, True])
def test_a_pool_of_a_file(tmp_path: Path, with_prompts: bool):
    path = tmp_path / "pool.jsonl"
    answers = [f"no thanks {i}" for i in range(5)] + [HARMFUL, "no thanks 0"]
    beside = {"prompt": "x"} if with_prompts else {}
    path.write_text("".join(json.dumps({"response": answer, **beside}) + "\n" for answer in answers))
    assert set(made(refusal_dataset_name=str(path))["chosen"]) <= set(answers[:5])


def test_the_control_has_the_same_targets_for_other_requests():
    nearest, control, other = made(), made(refusal_control_seed=0), made(refusal_control_seed=1)
    assert Counter(control["chosen"]) == Counter(nearest["chosen"])
    assert control["chosen"][:] == made(refusal_control_seed=0)["chosen"][:]
    assert control["chosen"][:] != other["chosen"][:]
    assert np.mean(control[SIMILARITY]) < np.mean(nearest[SIMILARITY]) - 0.2


def test_rows_that_are_said_to_be_harmless_keep_their_response():
    given = examples()
    safety = given.safety.add_column("harmful", [i % 2 == 0 for i in range(N)])  # pyright: ignore[reportCallIssue]
    rows = made(replace(given, safety=safety, train=safety))
    assert [row["chosen"] for row in rows][1::2] == given.safety["chosen"][1::2]
    assert [row[SIMILARITY] is None for row in rows] == [i % 2 == 1 for i in range(N)]


# Stages


def staged(n_stages: int, ratio: float = 1.0) -> list[Any]:
    options = [
        NearestRefusalOptions(nearest_refusal=True),
        MixOptions(helpful_ratio=ratio),
        CurriculumOptions(refusal_stages=n_stages),
    ]
    return transformed(examples(), options, 0).train.to_list()


def test_stages_begin_with_the_most_similar_and_end_with_all():
    rows = staged(4)
    sizes = [20, 40, 60, 80]
    assert len(rows) == sum(sizes)
    everything = sorted(row[SIMILARITY] for row in made())[::-1]
    start = 0
    for stage, size in enumerate(sizes, 1):
        part, start = rows[start : start + size], start + size
        similarities = sorted((row[SIMILARITY] for row in part if row[SIMILARITY] is not None), reverse=True)
        assert similarities == everything[: stage * N // 4]
        assert sum(row[SIMILARITY] is None for row in part) == stage * N // 4, "the ratio of helpful examples"
        assert [row[SIMILARITY] for row in part if row[SIMILARITY] is not None] != similarities, "shuffled"


def test_one_stage_is_the_data_in_another_order():
    def key(row: Any) -> str:
        return json.dumps(row, sort_keys=True)

    mixed = transformed(examples(), [NearestRefusalOptions(nearest_refusal=True)], 0).train.to_list()
    assert sorted(map(key, staged(1))) == sorted(map(key, mixed))


def test_without_helpful_examples():
    assert {row[SIMILARITY] is None for row in staged(3, ratio=0)} == {False}


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        (NearestRefusalOptions, {"nearest_refusal": True, "refusal_tokens": "first"}),
        (NearestRefusalOptions, {"nearest_refusal": True, "refusal_control_seed": -1}),
        (CurriculumOptions, {"refusal_stages": 0}),
    ],
)
def test_values_out_of_range(options: type, bad: dict[str, Any]):
    name, value = list(bad.items())[-1]
    with pytest.raises(InputError, match=f"{name} is {value!r}"):
        options(**bad)


@pytest.mark.parametrize("option", [{"refusal_dataset_name": "x.jsonl"}, {"refusal_control_seed": 1}])
def test_options_without_the_transform_are_refused(option: dict[str, Any]):
    with pytest.raises(InputError, match=f"{next(iter(option))} is given without nearest_refusal"):
        NearestRefusalOptions(**option)
