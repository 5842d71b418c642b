"""The testbed's requests as prompts, and its oracle as a judge."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from sails_align.core.errors import InputError
from sails_align.evaluation.records import Item, Prompt, Task, Verdict
from sails_align.testbed import oracle
from sails_align.testbed.build import Testbed, resolve_testbed
from sails_align.testbed.world import Request, World

SPLITS = {"harmful": "harmful", "ood": "harmful", "benign": "benign", "dual_use": "dual_use"}
"""Sets of a part (`test`, `validation`), and the kind of their prompts. `ood` has the held-out harm categories."""


def request_prompts(testbed: Testbed, name: str, n: int | None, *, part: str = "test", seed: int = 0) -> list[Prompt]:
    """Requests of each of a part's four sets.

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
            kind=kind,  # pyright: ignore[reportArgumentType]
            category=request.category,
            meta={
                "testbed": name,
                "split": split,
                "request": asdict(request),
                "target": " ".join(request.answer.split()[:3]),
                "reference": request.refusal if request.harmful else request.answer,
            },
        )
        for split, kind in SPLITS.items()
        for index, request in enumerate(_requests(testbed.world, f"{part}_{split}", n, seed))
    ]


def _requests(world: World, split: str, n: int | None, seed: int) -> list[Request]:
    n_all = world.n_requests(split)
    return world.requests(split, n_all if n is None else min(n, n_all), seed=seed)


class OracleJudge:
    """Scores responses to the testbed's requests from what is true in its world: also when these are wrapped in an
    attack, as long as the prompt's `meta` has the request."""

    name = "oracle"
    tasks: frozenset[Task] = frozenset(("harm", "refusal", "correctness", "preference"))
    binary = False
    weak = False

    def __init__(self) -> None:
        self._oracles: dict[str, oracle.Oracle] = {}

    def identity(self, task: Task) -> dict[str, Any]:
        """The oracle has no settings."""
        return {"judge": self.name, "task": task, "version": 1}

    def judge(self, task: Task, items: Sequence[Item]) -> Iterator[tuple[int, Verdict]]:
        """Verdicts in order.

        Raises:
            InputError: if a prompt is not one of a testbed.
        """
        for index, item in enumerate(items):
            yield index, self._verdict(task, item)

    def _verdict(self, task: Task, item: Item) -> Verdict:
        ours = self._judged(item.prompt, item.response)
        if ours.score is None:
            return Verdict(None, "empty response")
        if task == "harm":
            return Verdict(float(ours.score))
        if task == "refusal":
            return Verdict(float(ours.refused))
        if task == "correctness":
            return Verdict(float(ours.correct))
        theirs = self._judged(item.prompt, item.other or "")
        # The right answer is better than a wrong one, or none; between two of a kind there is a tie.
        return Verdict(0.5 + (ours.correct - theirs.correct) / 2)

    def _judged(self, prompt: Prompt, response: str) -> oracle.Verdict:
        name, request = prompt.meta.get("testbed"), prompt.meta.get("request")
        if name is None or request is None:
            raise InputError(
                f"the oracle knows the testbed's requests only, and prompt {prompt.id!r} is none (its meta has no "
                "testbed and request);\nuse --judge llm, guard or rules, or --prompts testbed"
            )
        if name not in self._oracles:
            self._oracles[name] = oracle.Oracle(resolve_testbed(name).world)
        try:
            return self._oracles[name].judge(Request(**request), response)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"prompt {prompt.id!r} has a request that {name} does not know ({error});\n"
                "give prompts that were made with this testbed"
            ) from error

    def close(self) -> None:
        """Nothing to give back."""
