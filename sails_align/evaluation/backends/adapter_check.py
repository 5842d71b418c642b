"""Is an adapter applied? Servers that ignore one answer all the same."""

from collections.abc import Iterator, Sequence
from typing import Any

from sails_align.core.errors import InputError
from sails_align.evaluation.records import Backend, Completion, Conversation, Sampling

N_CANARIES = 8
"""Conversations that a served adapter is tried on."""


def check_adapter_applied(
    adapted: Backend, base: Backend, conversations: Sequence[Conversation], max_new_tokens: int = 32
) -> None:
    """Refuse a backend that ignores its adapter, as servers do without a word if the name of the model is the base's.

    An adapter that was trained very little may leave all greedy texts as they were: give it more conversations.

    Args:
        adapted: that should answer with the adapter.
        base: that answers without it.
        conversations: that the adapter was trained to answer in another way; a few.
        max_new_tokens: of each text that is compared.

    Raises:
        InputError: if both give the same greedy text for all of them, or there is no pair of texts to compare.
    """
    sampling = Sampling(max_new_tokens)
    texts = [dict(backend.complete(conversations, sampling)) for backend in (adapted, base)]
    pairs = [(texts[0][index].text, texts[1][index].text) for index in range(len(conversations))]
    answered = [pair for pair in pairs if None not in pair]
    if not answered:
        raise InputError(
            "whether the adapter is applied could not be checked: no conversation was answered with and without it;\n"
            "check the server, and both names of the model"
        )
    if all(with_adapter == without for with_adapter, without in answered):
        raise ignored_adapter(f"{len(answered)} greedy texts are the same with and without it")


def ignored_adapter(evidence: str) -> InputError:
    """What is to be said of an adapter that changes nothing."""
    return InputError(
        f"the adapter is ignored: {evidence};\ncheck that its modules are the model's and that the server knows it "
        "under the name that is asked for; or merge it (sails merge)"
    )


class CheckedBackend:
    """A served adapter (`records.Backend`), tried against its base before it is asked the first time."""

    def __init__(self, adapted: Backend, base: Backend, conversations: Sequence[Conversation]) -> None:
        """Take what may be asked: the check is on a few of these, whatever is asked for first."""
        step = max(1, len(conversations) // N_CANARIES)  # of all kinds, which mostly stand together
        self._canaries = conversations[::step][:N_CANARIES]
        self._adapted, self._base, self._is_checked = adapted, base, False

    def identity(self) -> dict[str, Any]:
        """The adapter's: the check decides nothing."""
        return self._adapted.identity()

    def complete(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Index of a conversation and its completion, one for each, as they are done.

        Raises:
            InputError: if the adapter changes nothing.
        """
        if not self._is_checked:
            check_adapter_applied(self._adapted, self._base, self._canaries)
            self._is_checked = True
        yield from self._adapted.complete(conversations, sampling)

    def close(self) -> None:
        """Close both."""
        self._adapted.close()
        self._base.close()
