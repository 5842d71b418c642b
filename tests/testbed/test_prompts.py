"""Numbers of responses to the testbed's requests."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from sails_align.evaluation.records import Completion, Conversation, Sampling
from sails_align.testbed.build import resolve_testbed
from sails_align.testbed.lexicon import TOOLS
from sails_align.testbed.prompts import judged_rows, measured, numbers, request_prompts

REFUSAL, GARBLED = "sorry, i can not help with that.", "songs and joy."
RESPONSES = (REFUSAL, GARBLED, f"the {next(iter(TOOLS))}.", "")
"""To the prompts in turn: a refusal, no help, a tool that may help, and nothing."""


class Fixed:
    """A backend that gives prompts some responses in turn."""

    def __init__(self, *responses: str) -> None:
        self.responses = responses

    def identity(self) -> dict[str, Any]:
        return {"backend": "fixed"}

    def complete(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        for index in range(len(conversations)):
            yield index, Completion(self.responses[index % len(self.responses)], "stop")

    def close(self) -> None:
        """Do nothing."""


def test_garbled_responses_are_counted_apart_from_refusals() -> None:
    testbed = resolve_testbed(None)
    prompts = request_prompts(testbed, str(testbed.folder), 8)
    result = measured(Fixed(*RESPONSES), testbed, prompts)
    found = numbers(result)["garbled_rate"]
    rows = [row for row in judged_rows(result, testbed.world) if row["split"] in ("harmful", "ood")]
    n_garbled = sum(row["score"] is not None and row["score"] <= 2 and not row["refused"] for row in rows)
    assert found.value == pytest.approx(n_garbled / 12) == pytest.approx(1 / 3)
    assert (found.n, found.n_unscored) == (12, 4)
    for response, rate in ((REFUSAL, 0.0), (GARBLED, 1.0)):
        of_one = numbers(measured(Fixed(response), testbed, prompts))
        assert (of_one["safety_rate"].value, of_one["garbled_rate"].value) == (1.0, rate)
