"""A server's URL, its secrets, which are never shown, and the connections to it."""

import base64
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from sails_align.core.errors import InputError

CONNECT_TIMEOUT = 10.0
"""Seconds to open a connection."""
SHORTEST_SECRET = 8
"""Characters; a shorter key (`EMPTY`, `none`) is a placeholder, and a word that texts may hold."""
EXCERPT = 300
"""Characters of a server's message that are kept."""

_EXAMPLE = "give one like http://localhost:8000/v1"


@dataclass(eq=False)
class ServerError(Exception):
    """A request without an answer. The message has no secrets."""

    message: str
    kind: Literal["passing", "prompt", "denied", "unreachable"] = "passing"
    """A retry may help, this prompt alone fails, all requests fail, or there never was a connection."""
    status: int = 0
    code: str = ""
    param: str = ""
    retry_after: float = 0.0
    """Seconds."""

    def __str__(self) -> str:
        return self.message


class Endpoint:
    """A server; many threads can share it.

    Args:
        base_url: up to `/v1`. A user name and password in it are sent in place of the key.
        api_key_env: environment variable with the key; it need not be set (local servers).
        timeout: seconds to wait for an answer.

    Raises:
        InputError: if the URL, the key or a proxy's setting cannot be used. It shows no secret.
    """

    def __init__(self, base_url: str, api_key_env: str, timeout: float) -> None:
        self._url = _read_url(base_url)
        self.base_url = str(self._url.copy_with(userinfo=b"")).rstrip("/")
        self._key, self._timeout = _read_key(api_key_env), timeout
        self.has_key = bool(self._key)
        basic = base64.b64encode(f"{self._url.username}:{self._url.password}".encode()).decode()
        secrets = {self._key, self._url.password, self._url.userinfo.decode("ascii", "replace"), basic}
        self._secrets = sorted((text for text in secrets if len(text) >= SHORTEST_SECRET), key=len, reverse=True)
        self._ssl_context = httpx.create_ssl_context()  # takes longer than many requests
        self._was_reached = False
        self._idle = [self._connect()]
        self._lock = threading.Lock()
        self._streams: weakref.WeakSet[Any] = weakref.WeakSet()

    def scrub(self, text: str) -> str:
        """Return the text without secrets, which a server may echo, and lone surrogates, which no file can hold."""
        for secret in self._secrets:
            text = text.replace(secret, "[secret]")
        return text.encode("utf-8", "replace").decode()

    def excerpt(self, text: str) -> str:
        """Return the beginning of a scrubbed text, on one line."""
        return " ".join(self.scrub(text).split())[:EXCERPT]

    def post(self, path: str, body: Mapping[str, Any], stop: threading.Event) -> tuple[httpx.Response, bytes]:
        """Send a request. Return the response and its body, whatever its status.

        Raises:
            ServerError: if there is none in time, or `stop` is set.
        """
        if stop.is_set():
            raise ServerError("interrupted")
        deadline, content = time.monotonic() + self._timeout, bytearray()
        # json.dumps escapes lone surrogates, which no UTF-8 body can hold and httpx would fail on.
        request = {"content": json.dumps(body).encode(), "extensions": {"trace": self._watch(stop)}}
        try:
            with self._client() as client, client.stream("POST", f"{self.base_url}/{path}", **request) as response:
                # httpx's timeout is for each read: some servers send blanks for minutes to keep a connection.
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("")
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            kind = "passing" if self._was_reached else "unreachable"
            raise ServerError(self.excerpt(str(error)) or "no connection in time", kind) from error
        except httpx.TimeoutException as error:
            raise ServerError(f"no answer within {self._timeout:g} s") from error
        except httpx.RequestError as error:
            raise ServerError(self.excerpt(str(error)) or type(error).__name__) from error
        return response, bytes(content)

    def models(self) -> list[str]:
        """Return the names of the server's models; none if it does not say."""
        try:
            with self._client() as client:
                response = client.get(f"{self.base_url}/models", timeout=CONNECT_TIMEOUT)
            return [self.scrub(str(model["id"])) for model in response.json()["data"]]
        except (httpx.RequestError, ValueError, KeyError, TypeError):
            return []

    def abort(self) -> None:
        """Cut all connections, so that threads that wait for an answer go on. Later requests open new ones."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            _cut(stream)

    def close(self) -> None:
        """Close the idle connections. Later requests open new ones."""
        clients, self._idle = self._idle, []
        for client in clients:
            client.close()

    @contextmanager
    def _client(self) -> Iterator[httpx.Client]:
        """Lend a client to one request, so that each has one connection.

        In a pool that threads share, httpcore 1.0 looks at all connections for each request, in time quadratic in their
        number: 4 ms of a request's time with 128 of them, against 0.5 ms like this.
        """
        try:
            client = self._idle.pop()
        except IndexError:
            client = self._connect()
        try:
            yield client
        finally:
            self._idle.append(client)

    def _connect(self) -> httpx.Client:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            return httpx.Client(
                headers=headers,
                auth=(self._url.username, self._url.password) if self._url.userinfo else None,
                timeout=httpx.Timeout(self._timeout, connect=min(CONNECT_TIMEOUT, self._timeout), pool=None),
                verify=self._ssl_context,
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:  # no URL, or SOCKS without its package
            raise InputError(
                "the environment sets a proxy that cannot be used "
                f"({type(error).__name__}; SOCKS needs `pip install 'httpx[socks]'`);\n"
                "correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or exempt the server with NO_PROXY"
            ) from error

    def _watch(self, stop: threading.Event) -> Callable[[str, Mapping[str, Any]], None]:
        """Return httpx's `trace` extension, which notes the streams for `abort`."""
        secured = self._url.scheme == "https"

        def trace(event: str, info: Mapping[str, Any]) -> None:
            if not event.endswith(("connect_tcp.complete", "start_tls.complete")):
                return
            with self._lock:
                self._streams.add(info["return_value"])
            # A proxy is reached by TCP, but what is behind it by TLS. No thread may take back what another one found.
            if not secured or event.endswith("start_tls.complete"):
                self._was_reached = True
            if stop.is_set():  # `abort` may have come too early for this one
                _cut(info["return_value"])

        return trace


def _cut(stream: Any) -> None:
    """Shut the socket down: to close it would not wake its reader."""
    with suppress(OSError):  # closed already
        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def _read_url(base_url: str) -> httpx.URL:
    shown = base_url.rpartition("@")[2].partition("?")[0]  # neither a password nor a key in a query
    try:
        url = httpx.URL(base_url.strip())
    except httpx.InvalidURL:
        raise InputError(f"{shown!r} cannot be read as a server's URL; {_EXAMPLE}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"{shown!r} is not a server's URL; {_EXAMPLE}")
    if url.query or url.fragment:  # httpx logs them
        raise InputError(f"the server's URL {shown} has a query or a fragment; give it without, up to /v1")
    return url


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"the environment variable {variable} holds blanks, line ends or non-ASCII characters, which no key has;\n"
            "set it to the key alone"
        )
    return key
