"""Where a server is and what opens it: its URL and key, which are never shown."""

import base64
import os

import httpx

from sails_align.core.errors import InputError

CONNECT_TIMEOUT = 10.0
"""Seconds to open a connection."""
SHORTEST_SECRET = 8
"""Characters; a shorter key (`EMPTY`, `none`) is a placeholder, and a word that texts may hold."""
EXCERPT = 300
"""Characters of a server's message that are kept."""

_EXAMPLE = "give one like http://localhost:8000/v1"


class Endpoint:
    """A server's URL and the secrets that go to it.

    Args:
        base_url: up to `/v1`. A user name and password in it are sent in place of the key.
        api_key_env: environment variable with the key; it need not be set (local servers).

    Raises:
        InputError: if the URL or the key cannot be used. It shows no secret.
    """

    def __init__(self, base_url: str, api_key_env: str) -> None:
        self._url = _read_url(base_url)
        self.base_url = str(self._url.copy_with(userinfo=b"")).rstrip("/")
        self.api_key_env = api_key_env
        self._key = _read_key(api_key_env)
        basic = base64.b64encode(f"{self._url.username}:{self._url.password}".encode()).decode()
        secrets = {self._key, self._url.password, self._url.userinfo.decode("ascii", "replace"), basic}
        self._ssl_context = httpx.create_ssl_context()  # takes longer than many requests
        self._secrets = sorted((text for text in secrets if len(text) >= SHORTEST_SECRET), key=len, reverse=True)

    @property
    def has_key(self) -> bool:
        """Whether the environment has a key."""
        return bool(self._key)

    def scrub(self, text: str) -> str:
        """The text without secrets, which a server may echo, and without the lone surrogates that no file can hold."""
        for secret in self._secrets:
            text = text.replace(secret, "[secret]")
        return text.encode("utf-8", "replace").decode()

    def excerpt(self, text: str) -> str:
        """The beginning of a scrubbed text, on one line."""
        return " ".join(self.scrub(text).split())[:EXCERPT]

    def connect(self, timeout: float) -> httpx.Client:
        """A client that sends the secrets with each request, for one thread at a time.

        Args:
            timeout: seconds to wait for each read.

        Raises:
            InputError: if the environment sets a proxy that cannot be used.
        """
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            return httpx.Client(
                headers=headers,
                auth=(self._url.username, self._url.password) if self._url.userinfo else None,
                timeout=httpx.Timeout(timeout, connect=min(CONNECT_TIMEOUT, timeout), pool=None),
                verify=self._ssl_context,
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:  # no URL, or SOCKS without its package
            raise InputError(
                "the environment sets a proxy that cannot be used "
                f"({type(error).__name__}; SOCKS needs `pip install 'httpx[socks]'`);\n"
                "correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or exempt the server with NO_PROXY"
            ) from error


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
