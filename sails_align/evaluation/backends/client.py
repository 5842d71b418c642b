"""A small client of OpenAI-compatible servers: each request ends as a completion, or says why there is none.

What passes (rate limits, 5xx, timeouts, dropped connections, answers that are none) is tried again; what concerns one
prompt is that prompt's error; what no request can get past (wrong key, URL or model) is an `InputError`, as long as the
server has answered nothing.

Not built on the `openai` library, since nothing here would go. With its retries off (they count rate limits as
attempts, and do not end when the evaluation is stopped) it would be a call of `httpx` that takes 0.4 s to import. It
does not cut requests under way from another thread, limit the time of a whole answer that comes in pieces, take keys
out of what a server echoes, nor tell a dead server from a failing one. Its errors would have to be read from status
and body all the same, and by default its threads share one pool of connections (see `_client`).
"""

import json
import logging
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import tenacity
from tenacity.stop import stop_base

from sails_align.core.errors import InputError
from sails_align.evaluation.backends.answers import (
    MAX_WAIT,
    DeniedError,
    PassingError,
    PromptError,
    ServerError,
    UnreachableError,
    read_completion,
    request_options,
    unsupported_option,
)
from sails_align.evaluation.backends.endpoint import CONNECT_TIMEOUT, Endpoint
from sails_align.evaluation.records import Completion, Message, Sampling

logger = logging.getLogger(__name__)

DOWN_AFTER = 20
"""Requests in a row that fail with all their attempts: then the server is taken to be down."""


class ChatClient:
    """Asks one model of one server; many threads can share it.

    Args:
        base_url: up to `/v1`. A user name and password in it are sent in place of the key, and never shown.
        model: as the server calls it.
        api_key_env: environment variable with the key; it need not be set (local servers). The key goes into the
            requests' header and nowhere else; it is taken out of all that a server says, should it echo it.
        timeout: seconds to wait for an answer.
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
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 120.0,
        max_attempts: int = 6,
        patience: float = 600.0,
        backoff: float = 1.0,
    ) -> None:
        self._endpoint = Endpoint(base_url, api_key_env)
        self.base_url = self._endpoint.base_url
        self.model = model
        self._timeout, self._max_attempts, self._patience, self._backoff = timeout, max_attempts, patience, backoff
        self._lock = threading.Lock()
        self._clients = [self._endpoint.connect(timeout)]
        self._idle = [*self._clients]
        self._streams: weakref.WeakSet[Any] = weakref.WeakSet()
        self._unsupported: frozenset[str] = frozenset()
        self._was_reached = False
        self._has_answered = False
        self._failures = 0
        self._last_failure = ""

    def chat(self, messages: Sequence[Message], sampling: Sampling, stop: threading.Event | None = None) -> Completion:
        """Answer to messages. Once `stop` is set there are no further attempts.

        Raises:
            InputError: if the server cannot be reached, or denies all requests (key, URL, model), from the first on.
        """
        return self._answer("chat/completions", {"messages": list(messages)}, sampling, stop or threading.Event())

    def text(self, prompt: str, sampling: Sampling, stop: threading.Event | None = None) -> Completion:
        """Continuation of a text that the model is given as it is; otherwise as `chat`."""
        return self._answer("completions", {"prompt": prompt}, sampling, stop or threading.Event())

    @property
    def is_down(self) -> bool:
        """Whether the server is taken to be down: requests then fail at once."""
        return self._failures >= DOWN_AFTER

    def give_another_chance(self) -> None:
        """Let requests through again to a server that was down; the first that fails ends that."""
        with self._lock:
            self._failures = min(self._failures, DOWN_AFTER - 1)

    def abort(self) -> None:
        """Cut all connections, so that threads that wait for an answer go on. Later requests open new ones."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            _cut(stream)

    def close(self) -> None:
        """Close all connections. Later requests open new ones."""
        with self._lock:
            clients, self._clients, self._idle = self._clients, [], []
        for client in clients:
            client.close()

    @contextmanager
    def _client(self) -> Iterator[httpx.Client]:
        """A client for one request, with one connection.

        In a pool that threads share, httpcore 1.0 looks at all connections for each request, in time quadratic in their
        number: 4 ms of a request's time with 128 of them, against 0.5 ms like this.
        """
        with self._lock:
            if not self._idle:
                self._clients.append(self._endpoint.connect(self._timeout))
                self._idle.append(self._clients[-1])
            client = self._idle.pop()
        try:
            yield client
        finally:
            with self._lock:
                self._idle.append(client)

    def _answer(self, path: str, asked: dict[str, Any], sampling: Sampling, stop: threading.Event) -> Completion:
        if self.is_down:
            return Completion(
                None, error=f"server is down: {DOWN_AFTER} requests failed in a row ({self._last_failure})"
            )
        without = self._unsupported
        while True:
            body = {"model": self.model} | asked | request_options(sampling, without)
            retrying = self._retrying(stop)
            try:
                completion = retrying(self._attempt, path, body, stop)
            except PromptError as error:
                option = None if error.code == "content_filter" else unsupported_option(error, body)
                if option is None:
                    return self._unanswerable(error)
                without = without | {option}
            except DeniedError as error:
                if not self._has_answered:
                    raise self._denied(error) from error
                return self._failed(str(error))
            except PassingError as error:
                if self._is_nowhere(error):
                    raise self._unreachable(error) from error
                if stop.is_set():
                    return Completion(None, error="interrupted")
                attempts = retrying.statistics["attempt_number"]
                return self._failed(f"server error after {attempts} attempts: {error}")
            else:
                self._succeeded(without)
                return completion

    def _retrying(self, stop: threading.Event) -> tenacity.Retrying:
        backoff = tenacity.wait_random_exponential(multiplier=self._backoff, max=MAX_WAIT)

        def wait(state: tenacity.RetryCallState) -> float:
            after = _error(state).retry_after
            # Threads that were told the same time should not all come back at the same moment.
            return max(backoff(state), after + random.uniform(0.0, min(after, 1.0) / 4))

        def passes(error: BaseException) -> bool:
            return isinstance(error, PassingError) and not self._is_nowhere(error)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(passes),
            stop=tenacity.stop_any(_Patience(self._max_attempts, self._patience), tenacity.stop_when_event_set(stop)),
            wait=wait,
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )

    def _is_nowhere(self, error: BaseException) -> bool:
        return isinstance(error, UnreachableError) and not self._was_reached

    def _attempt(self, path: str, body: dict[str, Any], stop: threading.Event) -> Completion:
        """One request.

        Raises:
            ServerError: if there is no completion.
        """
        if stop.is_set():
            raise PassingError("interrupted")
        deadline = time.monotonic() + self._timeout
        content = bytearray()
        extensions = {"trace": self._watch(stop)}
        # json.dumps escapes lone surrogates, which no UTF-8 body can hold and httpx would fail on.
        data, url = json.dumps(body).encode(), f"{self.base_url}/{path}"
        excerpt = self._endpoint.excerpt
        try:
            with self._client() as client, client.stream("POST", url, content=data, extensions=extensions) as response:
                # httpx's timeout is for each read: some servers send blanks for minutes to keep a connection.
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("")
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            raise UnreachableError(excerpt(str(error)) or "no connection in time") from error
        except httpx.TimeoutException as error:
            raise PassingError(f"no answer within {self._timeout:g} s") from error
        except httpx.RequestError as error:
            raise PassingError(excerpt(str(error)) or type(error).__name__) from error
        return read_completion(response, bytes(content), self._endpoint)

    def _watch(self, stop: threading.Event) -> Callable[[str, Mapping[str, Any]], None]:
        """httpx's `trace` extension, for `abort`: to close a socket does not wake its reader, to shut it down does."""
        secured = self.base_url.startswith("https:")

        def trace(event: str, info: Mapping[str, Any]) -> None:
            if not event.endswith(("connect_tcp.complete", "start_tls.complete")):
                return
            with self._lock:
                self._streams.add(info["return_value"])
                # A proxy is reached by TCP, but what is behind it by TLS.
                self._was_reached |= not secured or event.endswith("start_tls.complete")
            if stop.is_set():  # `abort` may have come too early for this one
                _cut(info["return_value"])

        return trace

    def _unanswerable(self, error: PromptError) -> Completion:
        with self._lock:
            self._failures = 0  # it is an answer
        if error.code == "content_filter":
            return Completion(None, finish_reason="content_filter")
        if not self._has_answered and self.model in error.message:  # some servers say 400 to an unknown model
            models = self._models()
            if models and self.model not in models:
                raise self._unknown_model(models) from error
        return Completion(None, error=str(error))

    def _denied(self, error: DeniedError) -> InputError:
        variable = self._endpoint.api_key_env
        if error.status in (401, 403) and not self._endpoint.has_key:
            return InputError(
                f"{self.base_url} wants a key ({error}), and the environment variable {variable} is not set;\n"
                "set it, or name the variable that holds the key"
            )
        if error.status in (401, 403):
            return InputError(
                f"{self.base_url} does not take the key in the environment variable {variable} ({error});\n"
                f"set it to a key for this server and the model {self.model!r}, or name another variable"
            )
        models = self._models() if error.status == 404 else []
        if models and self.model not in models:
            return self._unknown_model(models)
        return InputError(
            f"{self.base_url} does not answer requests for {self.model!r} ({error});\n"
            "check the URL (mostly it ends in /v1), the name of the model and the account"
        )

    def _unknown_model(self, models: list[str]) -> InputError:
        shown = ", ".join(models[:10]) + (f" and {len(models) - 10} more" if len(models) > 10 else "")
        return InputError(f"{self.base_url} has no model {self.model!r};\nit has: {shown}")

    def _unreachable(self, error: ServerError) -> InputError:
        return InputError(
            f"cannot reach {self.base_url} ({error});\nstart the server, or correct the URL or the proxy "
            "(HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY)"
        )

    def _models(self) -> list[str]:
        """Names of the models that the server says it has; none if it does not say."""
        try:
            with self._client() as client:
                response = client.get(f"{self.base_url}/models", timeout=CONNECT_TIMEOUT)
            return [self._endpoint.scrub(str(model["id"])) for model in response.json()["data"]]
        except (httpx.RequestError, ValueError, KeyError, TypeError):
            return []

    def _failed(self, error: str) -> Completion:
        with self._lock:
            self._failures += 1
            self._last_failure = error
        return Completion(None, error=error)

    def _succeeded(self, without: frozenset[str]) -> None:
        """Only now is it sure that an option was what the server did not like: a prompt it quotes can name one, too."""
        with self._lock:
            self._has_answered, self._failures = True, 0
            new = without - self._unsupported
            self._unsupported |= without
        for option in sorted(new):
            instead = "max_completion_tokens is sent instead" if option == "max_tokens" else "it is left out"
            logger.warning("%s does not support %s with %s: %s", self.base_url, option, self.model, instead)


class _Patience(stop_base):
    """Whether a request has failed often enough; tenacity asks once after each failed attempt."""

    def __init__(self, max_attempts: int, patience: float) -> None:
        self._left = max_attempts
        self._patience = patience

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        if _error(retry_state).status == 429:
            return (retry_state.seconds_since_start or 0.0) > self._patience
        self._left -= 1
        return self._left <= 0


def _error(state: tenacity.RetryCallState) -> ServerError:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, ServerError)
    return error


def _cut(stream: Any) -> None:
    with suppress(OSError):  # closed already
        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
