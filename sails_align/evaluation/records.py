"""Prompts, the responses to them, and the verdicts on these.

A backend turns prompts into completions, a judge turns responses into verdicts. Both say what decides their results
(`identity`), under which these are cached, and both yield results as they are done, in any order.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from sails_align.data.messages import Message, assistant

Conversation = Sequence[Message] | str
"""Messages that end with a user turn, or with the beginning of the response, which the model continues; or a text that
the model is given as it is: some models have their own format."""
Kind = Literal["harmful", "benign", "dual_use"]
"""To be refused; to be answered; to be answered though it looks harmful."""
Task = Literal["harm", "refusal", "helpfulness", "correctness", "preference", "likeness"]
"""What a judge is asked of a response: how harmful (1-5), refused (0 or 1), how helpful (1-10), right (0 or 1),
better than another one (1, 0.5 for a tie, 0), or like it (0 to 1)."""
Reason = Literal[
    "empty response",
    "no response",
    "unfinished reasoning",
    "too long to judge",
    "unparsable verdict",
    "refused by the judge",
    "server error",
]
"""Why a response is unscored."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that a model is asked to continue."""

    id: str
    """Unique within its set."""
    messages: tuple[Message, ...]
    """Ends with a user turn."""
    kind: Kind
    category: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able: `target` (how a compliant answer begins, for GCG), `reference` (a good answer), `prefill` (words that
    the response is forced to begin with), `request` (of the testbed), ..."""

    @property
    def text(self) -> str:
        """The content of the last user turn."""
        return self.messages[-1]["content"]

    @property
    def conversation(self) -> tuple[Message, ...]:
        """What the model is given: the messages, and what the response must begin with (`prefill` in meta), if any."""
        prefill = self.meta.get("prefill")
        return self.messages if not prefill else (*self.messages, assistant(prefill))


@dataclass(frozen=True)
class Sampling:
    """Options for sampling completions."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    schema: Mapping[str, Any] | None = None
    """JSON schema that a server is asked to keep to (structured output)."""


GUARDED = "guard"
"""The finish reason of a prompt that a guard refused before the model responded."""


@dataclass(frozen=True)
class Completion:
    """A backend's result for one conversation."""

    text: str | None
    """None if there is no response."""
    finish_reason: str | None = None
    """`stop`, `length`, `guard`, or what the server says (`content_filter`, ...)."""
    error: str | None = None
    """Why there is no text."""

    @property
    def failed(self) -> bool:
        """Whether there is no text."""
        return self.text is None


@dataclass(frozen=True)
class Item:
    """A response to be judged."""

    prompt: Prompt
    response: str
    other: str | None = None
    """The response to compare with, for the tasks `preference` and `likeness`."""


@dataclass(frozen=True)
class Verdict:
    """A score, or the reason why there is none."""

    score: float | None
    """On the scale of the task."""
    reason: Reason | None = None
    explanation: str | None = None
    """The judge's own words, or the error's."""

    def __post_init__(self) -> None:
        if (self.score is None) == (self.reason is None):
            raise ValueError(f"a verdict is a score or a reason, but this is {self.score!r} and {self.reason!r}")

    @property
    def failed(self) -> bool:
        """Whether it is unscored."""
        return self.score is None


VOTE = "vote"
"""The name of the vote of all judges, beside the names of the judges."""
Verdicts = Mapping[Task, Mapping[str, Mapping[int, Verdict]]]
"""By task, by judge (and `vote`, of all of them), by the prompt's place."""


class InferenceHook(Protocol):
    """A change of a model while it responds, such as a direction added to its residual stream."""

    def identity(self) -> dict[str, Any]:
        """Return all that decides its effect on a model; JSON-able."""
        ...

    def __call__(self, model: Any) -> AbstractContextManager[None]:
        """Change a loaded model within the block."""
        ...


class Backend(Protocol):
    """A model in this process, or on a server."""

    def identity(self) -> dict[str, Any]:
        """Return all that decides completions, except conversation and sampling; JSON-able, without secrets."""
        ...

    def complete(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Yield the index of a conversation and its completion, one for each, as they are done."""
        ...

    def close(self) -> None:
        """Free memory, processes and connections."""
        ...


class Judge(Protocol):
    """Something that scores responses."""

    name: str
    """`llm`, `guard`, `rules`, `oracle`."""
    tasks: frozenset[Task]
    """Tasks that it can score."""
    binary: bool
    """Whether its harm scores are only 1 and 5, so that their mean says nothing."""
    weak: bool
    """Whether its verdicts are known to be unreliable."""

    def identity(self, task: Task) -> dict[str, Any]:
        """Return all that decides a verdict, except the item; JSON-able, without secrets."""
        ...

    def judge(self, task: Task, items: Sequence[Item]) -> Iterator[tuple[int, Verdict]]:
        """Yield the index of an item and its verdict, one for each, as they are done.

        Responses are whole; `reasoning.answers_of` leaves the answers, which are to be judged.
        """
        ...

    def close(self) -> None:
        """Free memory, processes and connections."""
        ...
