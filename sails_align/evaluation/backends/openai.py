"""Completions from an OpenAI-compatible server: vLLM's, `transformers serve`, or a hosted one."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from sails_align.evaluation.backends.client import ChatClient
from sails_align.evaluation.records import Completion, Conversation, Sampling


class OpenAIBackend:
    """Asks a server, with several requests at once (`records.Backend`).

    Args:
        base_url: up to `/v1`.
        model: as the server calls it.
        concurrency: requests at once.
        options: of the client (`api_key_env`, `timeout`, `max_attempts`, `patience`, `backoff`).

    Raises:
        InputError: if the URL, the key or a proxy's setting cannot be used.
    """

    def __init__(self, base_url: str, model: str, *, concurrency: int = 16, **options: Any) -> None:
        self._client = ChatClient(base_url, model, **options)
        self._concurrency = concurrency

    def identity(self) -> dict[str, Any]:
        """The server and the model: it cannot be known whether the same name gives the same model tomorrow."""
        return {"backend": "openai", "base_url": self._client.base_url, "model": self._client.model}

    def complete(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Index of a conversation and its completion, one for each, as they are done.

        If the consumer stops, what has not begun is cancelled and what has is cut off, so that it returns at once.

        A circuit breaker keeps a dead server from costing all attempts of every request that is left: after
        `client.DOWN_AFTER` requests in a row that failed in spite of all attempts, the rest fail unsent. The
        next call tries again.

        Raises:
            InputError: if the server cannot be reached, or denies all requests (key, URL, model), from the first on.
        """
        self._client.give_another_chance()
        stop = threading.Event()
        executor = ThreadPoolExecutor(self._concurrency, thread_name_prefix="openai")
        is_done = False
        try:
            futures = {
                executor.submit(self._one, conversation, sampling, stop): index
                for index, conversation in enumerate(conversations)
            }
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
            is_done = True
        finally:  # also when interrupted before all were submitted, with the first under way
            executor.shutdown(wait=False, cancel_futures=True)
            stop.set()
            if not is_done:
                self._client.abort()

    def _one(self, conversation: Conversation, sampling: Sampling, stop: threading.Event) -> Completion:
        if isinstance(conversation, str):
            return self._client.text(conversation, sampling, stop)
        return self._client.chat(conversation, sampling, stop)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()
