"""Completions from an OpenAI-compatible server: vLLM's, `transformers serve`, or a hosted one.

Each request ends as a completion, or says why there is none. Errors that may pass (rate limits, 5xx, timeouts, dropped
connections, answers that are none) are retried; what concerns one prompt is that prompt's error; what no request can
get past (wrong key, URL or model) is an `InputError`, as long as the server has answered nothing.

Not built on the `openai` library: with its retries off (they count rate limits as attempts, and do not end when the
evaluation is stopped) it would be a call of `httpx` that takes 0.4 s to import. It does not cut requests under way from
another thread, limit the time of a whole answer that comes in pieces, take keys out of what a server echoes, nor tell a
dead server from a failing one.
"""

import itertools
import logging
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import tenacity

from sails_align.core.errors import InputError
from sails_align.evaluation.backends.answers import MAX_WAIT, read_completion, request_options, unsupported_option
from sails_align.evaluation.backends.endpoint import Endpoint, ServerError
from sails_align.evaluation.records import Completion, Conversation, Sampling

logger = logging.getLogger(__name__)

DOWN_AFTER = 20
"""Requests in a row that fail with all their attempts: then the server counts as down."""


class OpenAIBackend:
    """Asks one model of one server, with several requests at once (`records.Backend`).

    Args:
        base_url: up to `/v1`. A user name and password in it are sent in place of the key, and never shown.
        model: as the server calls it.
        concurrency: requests at once.
        api_key_env: environment variable with the key; it need not be set (local servers). The key goes into the
            requests' header and nowhere else; it is taken out of all that a server says, should it echo it.
        timeout: seconds to wait for an answer.
        stops: texts that end a completion.
        max_attempts: of each request. Rate limits (429) do not count: of many threads that share a quota, the unlucky
            would soon have used them up.
        patience: seconds after which a request gives up on rate limits.
        backoff: seconds before the second attempt, at most; doubles with each.

    Raises:
        InputError: if the URL, the key or a proxy's setting cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        concurrency: int = 16,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 120.0,
        stops: Sequence[str] = (),
        max_attempts: int = 6,
        patience: float = 600.0,
        backoff: float = 1.0,
    ) -> None:
        self._endpoint = Endpoint(base_url, api_key_env, timeout)
        self._model, self._api_key_env, self._concurrency = model, api_key_env, concurrency
        self._stops = list(stops)
        self._max_attempts, self._patience, self._backoff = max_attempts, patience, backoff
        self._lock = threading.Lock()
        self._unsupported: frozenset[str] = frozenset()
        self._has_answered = False
        self._failures, self._last_failure = 0, ""

    def identity(self) -> dict[str, Any]:
        """Return the server and the model: nothing tells whether the name means the same model tomorrow."""
        stops = {"stops": self._stops} if self._stops else {}
        return {"backend": "openai", "base_url": self._endpoint.base_url, "model": self._model, **stops}

    def complete(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Yield the index of a conversation and its completion, one for each, as they are done.

        If the consumer stops, what has not begun is cancelled and what has is cut off, so that it returns at once.

        A circuit breaker keeps a dead server from costing all attempts of every request that is left: after
        `DOWN_AFTER` requests in a row that failed in spite of all attempts, the rest fail unsent. The next call tries
        again, until the first failure. Raises `InputError` if the server cannot be reached, or denies all requests
        (key, URL, model), from the first on.
        """
        with self._lock:  # requests of an earlier call may still be ending
            self._failures = min(self._failures, DOWN_AFTER - 1)
        stop = threading.Event()
        waiting: SimpleQueue[tuple[int, Conversation]] = SimpleQueue()
        answered: SimpleQueue[tuple[int, Completion | BaseException]] = SimpleQueue()
        for numbered in enumerate(conversations):
            waiting.put(numbered)

        def work() -> None:
            with suppress(Empty):
                while not stop.is_set():
                    index, conversation = waiting.get_nowait()
                    try:
                        answered.put((index, self._answer(conversation, sampling, stop)))
                    except BaseException as error:
                        answered.put((index, error))

        n_left = len(conversations)
        try:
            # Not an executor: interrupted at the wrong moment, it keeps a lock that its threads then wait for, and the
            # process for them. A queue's lock cannot be left behind, and no process waits for a daemon.
            for number in range(min(self._concurrency, n_left)):
                threading.Thread(target=work, name=f"openai_{number}", daemon=True).start()
            while n_left:
                index, answer = answered.get()
                if isinstance(answer, BaseException):
                    raise answer
                n_left -= 1
                yield index, answer
        finally:  # also when interrupted before all threads were started, with the first request under way
            stop.set()
            if n_left:
                self._endpoint.abort()

    def close(self) -> None:
        """Close all connections."""
        self._endpoint.close()

    def _answer(self, conversation: Conversation, sampling: Sampling, stop: threading.Event) -> Completion:
        """Ask for one completion. Once `stop` is set there are no further attempts."""
        if self._failures >= DOWN_AFTER:
            down = f"server is down: {DOWN_AFTER} requests failed in a row ({self._last_failure})"
            return Completion(None, error=down)
        if not isinstance(conversation, str) and conversation[-1]["role"] == "assistant":
            return Completion(None, error="a server cannot be made to begin a response with given words")
        path, asked = "chat/completions", {"messages": conversation}
        if isinstance(conversation, str):
            path, asked = "completions", {"prompt": conversation}
        without = self._unsupported
        while True:
            body = {"model": self._model, **asked, **request_options(sampling, self._stops, without)}
            retrying = self._retrying(stop)
            try:
                completion = retrying(self._attempt, path, body, stop)
            except ServerError as error:
                option = unsupported_option(error, body)
                if option is None:
                    return self._without_answer(error, retrying.statistics["attempt_number"], stop)
                without = without | {option}
            else:
                self._succeeded(without)
                return completion

    def _attempt(self, path: str, body: Mapping[str, Any], stop: threading.Event) -> Completion:
        response, content = self._endpoint.post(path, body, stop)
        return read_completion(response, content, self._endpoint, self._stops)

    def _retrying(self, stop: threading.Event) -> tenacity.Retrying:
        backoff = tenacity.wait_random_exponential(multiplier=self._backoff, max=MAX_WAIT)
        n_failed = itertools.count(1)

        def is_enough(state: tenacity.RetryCallState) -> bool:
            if stop.is_set():
                return True
            if _error(state).status == 429:
                return (state.seconds_since_start or 0.0) > self._patience
            return next(n_failed) >= self._max_attempts

        def wait(state: tenacity.RetryCallState) -> float:
            after = _error(state).retry_after
            # Threads that were told the same time should not all come back at the same moment.
            return max(backoff(state), after + random.uniform(0.0, min(after, 1.0) / 4))

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, ServerError) and error.kind == "passing"),
            stop=is_enough,
            wait=wait,
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )

    def _without_answer(self, error: ServerError, n_attempts: int, stop: threading.Event) -> Completion:
        """Count a failure, and return the completion that says it."""
        message = str(error)
        if error.kind == "prompt":
            return self._unanswerable(error)
        if error.kind == "unreachable":
            raise InputError(
                f"cannot reach {self._endpoint.base_url} ({error});\nstart the server, or correct the URL or the proxy "
                "(HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY)"
            ) from error
        if error.kind == "denied" and not self._has_answered:
            raise self._denied(error) from error
        if error.kind == "passing":
            if stop.is_set():
                return Completion(None, error="interrupted")
            message = f"server error after {n_attempts} attempts: {error}"
        with self._lock:
            self._failures += 1
            self._last_failure = message
        return Completion(None, error=message)

    def _unanswerable(self, error: ServerError) -> Completion:
        with self._lock:
            self._failures = 0  # it is an answer
        if error.code == "content_filter":
            return Completion(None, finish_reason="content_filter")
        if not self._has_answered and self._model in error.message:  # some servers say 400 to an unknown model
            self._check_model(error)
        return Completion(None, error=str(error))

    def _denied(self, error: ServerError) -> InputError:
        url = self._endpoint.base_url
        if error.status in (401, 403) and not self._endpoint.has_key:
            return InputError(
                f"{url} wants a key ({error}), and the environment variable {self._api_key_env} is not set;\n"
                "set it, or name the variable that holds the key"
            )
        if error.status in (401, 403):
            return InputError(
                f"{url} does not take the key in the environment variable {self._api_key_env} ({error});\n"
                f"set it to a key for this server and the model {self._model!r}, or name another variable"
            )
        if error.status == 404:
            self._check_model(error)
        return InputError(
            f"{url} does not answer requests for {self._model!r} ({error});\n"
            "check the URL (mostly it ends in /v1), the name of the model and the account"
        )

    def _check_model(self, error: ServerError) -> None:
        """Raise an InputError if the server says which models it has, and this one is not among them."""
        models = self._endpoint.models()
        if models and self._model not in models:
            shown = ", ".join(models[:10]) + (f" and {len(models) - 10} more" if len(models) > 10 else "")
            raise InputError(f"{self._endpoint.base_url} has no model {self._model!r};\nit has: {shown}") from error

    def _succeeded(self, without: frozenset[str]) -> None:
        """Note a success, and only now what the server does not support: errors may quote prompts that name options."""
        with self._lock:
            self._has_answered, self._failures = True, 0
            new = without - self._unsupported
            self._unsupported |= without
        for option in sorted(new):
            instead = "max_completion_tokens is sent instead" if option == "max_tokens" else "it is left out"
            logger.warning("%s does not support %s with %s: %s", self._endpoint.base_url, option, self._model, instead)


def _error(state: tenacity.RetryCallState) -> ServerError:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, ServerError)
    return error
