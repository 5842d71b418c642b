"""Check that an adapter is applied: servers that ignore one answer all the same."""

from collections.abc import Iterator, Sequence
from typing import Any

from sails_align.core.errors import InputError
from sails_align.evaluation.records import Backend, Completion, Conversation, Sampling

N_CANARIES = 8
"""Conversations that a served adapter is tried on."""
TRIED = Sampling(max_new_tokens=32)


def check_adapter_applied(adapted: Backend, base: Backend, conversations: Sequence[Conversation]) -> None:
    """Refuse a backend that ignores its adapter, as servers do silently if the name of the model is the base's.

    An adapter that was trained very little may leave all greedy texts as they were: give it more conversations.

    Args:
        adapted: that should answer with the adapter.
        base: that answers without it.
        conversations: that the adapter was trained to answer in another way; a few.

    Raises:
        InputError: if both give the same greedy text for all of them, or there is no pair of texts to compare.
    """
    with_adapter, without = (dict(backend.complete(conversations, TRIED)) for backend in (adapted, base))
    pairs = [(with_adapter[index].text, without[index].text) for index in range(len(conversations))]
    answered = [pair for pair in pairs if None not in pair]
    if not answered:
        raise InputError(
            "whether the adapter is applied could not be checked: no conversation was answered with and without it;\n"
            "check the server, and both names of the model"
        )
    if all(ours == theirs for ours, theirs in answered):
        raise ignored_adapter(f"{len(answered)} greedy texts are the same with and without it")


def ignored_adapter(evidence: str) -> InputError:
    """Return the error to raise for an adapter that changes nothing."""
    return InputError(
        f"the adapter is ignored: {evidence};\ncheck that its modules are the model's and that the server knows it "
        "under the name that is asked for; or merge it (sails merge)"
    )


class CheckedBackend:
    """A served adapter (`records.Backend`), checked against its base before the first request."""

    def __init__(self, adapted: Backend, base: Backend, conversations: Sequence[Conversation]) -> None:
        """Choose some of all conversations for the check, evenly: those of one kind mostly stand together."""
        step = max(1, len(conversations) // N_CANARIES)
        self._canaries = conversations[::step][:N_CANARIES]
        self._adapted, self._base, self._is_checked = adapted, base, False

    def identity(self) -> dict[str, Any]:
        """Return the adapter's."""
        return self._adapted.identity()

    def complete(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Yield the index of a conversation and its completion, one for each, as they are done.

        Raises `InputError` if the adapter changes nothing.
        """
        if not self._is_checked:
            check_adapter_applied(self._adapted, self._base, self._canaries)
            self._is_checked = True
        yield from self._adapted.complete(conversations, sampling)

    def close(self) -> None:
        """Close both."""
        self._adapted.close()
        self._base.close()
