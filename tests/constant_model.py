"""A backend that gives the same response to everything."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sails_align.evaluation.records import Completion, Conversation, Sampling


@dataclass
class Says:
    """A model that says the same to everything."""

    text: str

    def identity(self) -> dict[str, Any]:
        return {"says": self.text}

    def complete(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        yield from enumerate([Completion(self.text)] * len(conversations))

    def close(self) -> None:
        pass
