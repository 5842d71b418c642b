"""Judge how alike a response is to another one, by the words that they have in common in order (ROUGE-L).

With a model's own answers as the reference, it tells how far training has kept the way that the model answers. It says
nothing about how good an answer is.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any

from sails_align.evaluation.reasoning import answers_of
from sails_align.evaluation.records import Item, Task, Verdict

_WORD = re.compile(r"\w+")


class _Words:
    """Words of any script, for `rouge-score`, whose own are English; text without spaces is one long word."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words in lower case."""
        return _WORD.findall(text.lower())


class RougeJudge:
    """Score the F-measure of ROUGE-L (Lin, 2004; the package `rouge-score`, without stemming): 0 to 1."""

    name = "rouge"
    tasks: frozenset[Task] = frozenset({"likeness"})
    binary = False
    weak = False

    def identity(self, task: Task) -> dict[str, Any]:
        """Return everything that affects a verdict except the item."""
        return {"judge": self.name, "task": task, "words": _WORD.pattern, "rouge-score": version("rouge-score")}

    @cached_property
    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rougeL"], tokenizer=_Words())

    def judge(self, task: Task, items: Sequence[Item]) -> Iterator[tuple[int, Verdict]]:
        """Yield the index of each item and its verdict.

        Raises:
            ValueError: for another task, or if an item has no other response.
        """
        if task not in self.tasks:
            raise ValueError(f"likeness to a reference says nothing about {task}")
        for index, item in enumerate(answers_of(items)):
            if isinstance(item, Verdict):
                yield index, item
            elif item.other is None:
                raise ValueError(f"likeness needs another response, but the item of prompt {item.prompt.id!r} has none")
            elif not _WORD.search(item.other):
                yield index, Verdict(None, "empty response", "the other response has no words")
            else:
                yield index, Verdict(self._scorer.score(item.other, item.response)["rougeL"].fmeasure)

    def close(self) -> None:
        """Do nothing."""
