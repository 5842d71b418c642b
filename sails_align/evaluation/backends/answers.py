"""Write requests to OpenAI-compatible servers, and read their answers and errors."""

import json
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from sails_align.evaluation.backends.endpoint import Endpoint, ServerError
from sails_align.evaluation.records import Completion, Sampling

MAX_WAIT = 60.0
"""Seconds between two attempts at most, also where Retry-After says more."""

_PASSING = (408, 409, 425, 429)
_ONE_PROMPT = (400, 413, 422)
_OPTIONS = {
    "response_format": re.compile(r"response_format|json_schema|structured output", re.IGNORECASE),
    "seed": re.compile(r"\bseed\b"),
    "temperature": re.compile(r"\btemperature\b"),
    "max_tokens": re.compile(r"\bmax_tokens\b"),
}
"""Options a request can do without, and how servers name them."""
_UNSUPPORTED = re.compile(
    r"not support|unsupported|unrecogni[sz]ed|unknown|unexpected|unavailable|only the default"
    r"|not (?:permitted|allowed|available|implemented)",
    re.IGNORECASE,
)
_FILTERED = re.compile(r"content_filter|content_policy|moderation|flagged", re.IGNORECASE)


def request_options(sampling: Sampling, without: frozenset[str]) -> dict[str, Any]:
    """Return the fields of a request that say how to draw, but for those that the server does not support."""
    options: dict[str, Any] = {"temperature": sampling.temperature, "seed": sampling.seed}
    if sampling.schema is not None:
        schema = {"name": "answer", "strict": True, "schema": dict(sampling.schema)}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    kept = {name: value for name, value in options.items() if name not in without}
    # OpenAI's reasoning models take only the new name, most other servers know only the old one.
    limit = "max_completion_tokens" if "max_tokens" in without else "max_tokens"
    return kept | {limit: sampling.max_new_tokens}


def unsupported_option(error: ServerError, body: Mapping[str, Any]) -> str | None:
    """Return the option of a request that the server does not support, if that is what its error says."""
    if error.kind != "prompt" or error.code == "content_filter":
        return None
    names = [name for name in _OPTIONS if name in body]
    if not _UNSUPPORTED.search(f"{error.code} {error.message}"):
        # Complaints about schemas have many words; the other names come up where a prompt is too long, too.
        names = [name for name in names if name == "response_format"]
    by_param = [name for name in names if name == error.param.partition(".")[0]]
    by_message = [name for name in names if _OPTIONS[name].search(error.message)]
    return next(iter(by_param + by_message), None)


def read_completion(response: httpx.Response, content: bytes, endpoint: Endpoint) -> Completion:
    """Return the completion in a response.

    Args:
        response: status and headers.
        content: its body.
        endpoint: takes secrets out of all texts.

    Raises:
        ServerError: if there is none.
    """
    if response.status_code != 200:
        raise _read_error(response, content, endpoint)
    kind = response.headers.get("content-type", "").partition(";")[0]
    if "json" not in kind:
        raise _no_answer(f"{kind or 'something'} and not JSON (is the URL right?)", content, endpoint)
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _no_answer("truncated or invalid JSON", content, endpoint) from error
    try:
        return _completion(answer["choices"][0], endpoint)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _no_answer("no completion", content, endpoint) from error


def _no_answer(what: str, content: bytes, endpoint: Endpoint) -> ServerError:
    return ServerError(f"the answer is {what}: {endpoint.excerpt(content.decode('utf-8', 'replace'))}")


def _completion(choice: dict[str, Any], endpoint: Endpoint) -> Completion:
    message = choice["message"] if "message" in choice else {"content": choice["text"]}
    text, reason = message["content"], choice.get("finish_reason")
    if reason == "content_filter" or message.get("refusal"):
        return Completion(endpoint.scrub(text).strip() if text else None, "content_filter")
    if text is None and (message.get("reasoning_content") or message.get("reasoning")):
        cause = f"the model reasoned but gave no answer (finish reason: {reason}); allow more new tokens"
        return Completion(None, reason, cause)
    if not isinstance(text, str):
        raise TypeError("no text")
    return Completion(endpoint.scrub(text).strip(), reason)  # stripped, as are other backends' texts


def _read_error(response: httpx.Response, content: bytes, endpoint: Endpoint) -> ServerError:
    status, headers = response.status_code, response.headers
    message, code, param = _error_fields(content.decode("utf-8", "replace"))
    where = f" (redirects to {headers['location']})" if response.has_redirect_location else ""
    text = f"status {status}: {endpoint.excerpt((message or response.reason_phrase) + where)}"
    if status in (*_ONE_PROMPT, 403) and _FILTERED.search(f"{code} {message}"):
        return ServerError(text, "prompt", status, "content_filter")
    if status in _ONE_PROMPT:
        return ServerError(text, "prompt", status, code, param)
    # "insufficient_quota" is OpenAI's 429 for an account without money: no waiting helps.
    if (status in _PASSING or status >= 500) and code != "insufficient_quota":
        return ServerError(text, "passing", status, code, retry_after=_retry_after(headers.get("retry-after", "")))
    return ServerError(text, "denied", status, code)


def _error_fields(text: str) -> tuple[str, str, str]:
    """Return message, code and parameter of an error's body, whatever form the server gives it."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return text, "", ""
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    if isinstance(error, dict):
        message = error.get("message") or json.dumps(error)
        return str(message), str(error.get("code") or ""), str(error.get("param") or "")
    return error if isinstance(error, str) else json.dumps(error), "", ""


def _retry_after(value: str) -> float:
    """Return the seconds that a Retry-After header asks for, at most `MAX_WAIT`; 0 if it cannot be read."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(0.0, seconds), MAX_WAIT)  # 0 first: that makes 0 of NaN
