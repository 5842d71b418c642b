"""Write requests to OpenAI-compatible servers, and read their answers and errors."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from sails_align.core.text import cut_at
from sails_align.evaluation.backends.endpoint import Endpoint, ServerError
from sails_align.evaluation.records import Completion, Sampling

MAX_WAIT = 60.0
"""Seconds between two attempts at most, also where Retry-After says more."""

_PASSING = (408, 409, 425, 429)
_ONE_PROMPT = (400, 413, 422)
_OPTIONS = {
    "response_format": re.compile(
        r"response.?format|json.?schema|structured.?output|grammar|guided|requested parameters", re.IGNORECASE
    ),
    "seed": re.compile(r"\bseed\b"),
    "temperature": re.compile(r"\btemperature\b"),
    "max_tokens": re.compile(r"\bmax_tokens\b"),
    "stop": re.compile(r"\bstop\b"),
}
"""Options a request can do without, and how servers name them."""
_UNSUPPORTED = re.compile(
    r"not support|unsupported|unrecogni[sz]ed|unknown|unexpected|unavailable|only the default"
    r"|not (?:permitted|allowed|available|implemented)",
    re.IGNORECASE,
)
_FILTERED = re.compile(
    r"content.?filter|content.?policy|moderation|flagged|safety (?:system|filter|setting|reason)|data.?inspection"
    r"|inappropriate content|sensitive (?:content|words?)|content exists risk",
    re.IGNORECASE,
)
"""How servers say that they withhold answers to a prompt."""

# Finish reasons, which servers write in many ways ("MAX_TOKENS", "content_filter: SAFETY"), by what they mean.
_CUT_OFF = re.compile(r"length|max.?tokens", re.IGNORECASE)
_WITHHELD = re.compile(
    r"filter|refus|safety|moderat|flagged|block|prohibited|recitation|sensitive|guardrail|spii", re.IGNORECASE
)
_BROKEN_OFF = re.compile(
    r"error|abort|cancel|fail|time.?out|insufficient|interrupt|overload|unavailable", re.IGNORECASE
)
_CALLED = re.compile(r"tool|function", re.IGNORECASE)
_TEXT = ("text", "output_text")
"""Types of the parts of a message that are its text."""


def request_options(sampling: Sampling, stops: Sequence[str], without: frozenset[str]) -> dict[str, Any]:
    """Return the fields of a request that say how to draw and where to stop, but for those that a server refuses."""
    options: dict[str, Any] = {"temperature": sampling.temperature, "seed": sampling.seed}
    if sampling.schema is not None:
        schema = {"name": "answer", "strict": True, "schema": dict(sampling.schema)}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    if stops:
        options["stop"] = list(stops)
    kept = {name: value for name, value in options.items() if name not in without}
    # OpenAI's reasoning models take only the new name, most other servers know only the old one.
    limit = "max_completion_tokens" if "max_tokens" in without else "max_tokens"
    return kept | {limit: sampling.max_new_tokens}


def unsupported_option(error: ServerError, body: Mapping[str, Any]) -> str | None:
    """Return the option of a request that the server does not support, if that may be what its error says.

    Complaints about a JSON schema come in all words and codes, so that any complaint about a request that has one is
    put down to it, if to nothing else.
    """
    if error.code == "content_filter":
        return None
    names = [name for name in _OPTIONS if name in body]
    if error.kind != "prompt" or not _UNSUPPORTED.search(f"{error.code} {error.message}"):
        # The other names come up where a prompt is too long, too.
        names = [name for name in names if name == "response_format"]
    by_param = [name for name in names if name == error.param.partition(".")[0]]
    by_message = [name for name in names if _OPTIONS[name].search(error.message)]
    by_default = [name for name in names if name == "response_format" and error.status in (400, 422)]
    return next(iter(by_param + by_message + by_default), None)


def read_completion(
    response: httpx.Response, content: bytes, endpoint: Endpoint, stops: Sequence[str] = ()
) -> Completion:
    """Return the completion in a response.

    Args:
        response: status and headers.
        content: its body.
        endpoint: takes secrets out of all texts.
        stops: texts that end a completion; some servers do not stop at them.

    Raises:
        ServerError: if there is none.
    """
    if response.status_code != 200:
        raise _read_error(response, content.decode("utf-8", "replace"), endpoint)
    kind = response.headers.get("content-type", "").partition(";")[0]
    if "json" not in kind:
        raise _no_answer(f"{kind or 'something'} and not JSON (is the URL right?)", content, endpoint)
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _no_answer("truncated or invalid JSON", content, endpoint) from error
    if isinstance(answer, dict) and answer.get("error") and not answer.get("choices"):
        raise _read_error(response, json.dumps(answer), endpoint)  # some hosts send errors with status 200
    try:
        return _completion(answer["choices"][0], response, endpoint, stops)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _no_answer("no completion", content, endpoint) from error


def _no_answer(what: str, content: bytes, endpoint: Endpoint) -> ServerError:
    return ServerError(f"the answer is {what}: {endpoint.excerpt(content.decode('utf-8', 'replace'))}")


def _completion(
    choice: dict[str, Any], response: httpx.Response, endpoint: Endpoint, stops: Sequence[str]
) -> Completion:
    """Return the completion in a choice. Its finish reason decides first: part of a text is no answer."""
    reason, error = choice.get("finish_reason"), choice.get("error")
    if reason and _WITHHELD.search(reason):
        return Completion(None, "content_filter")
    if error or (reason and _BROKEN_OFF.search(reason)):
        error = error or f"the server broke the answer off (finish reason: {reason})"
        raise _read_error(response, json.dumps({"error": error}), endpoint)
    reason = "length" if reason and _CUT_OFF.search(reason) else reason
    message = choice.get("message") or {"content": choice.get("text")}
    parts = _parts(message.get("content"))
    if refusal := message.get("refusal") or "".join(text for kind, text in parts if kind == "refusal"):
        return Completion(endpoint.scrub(refusal).strip(), "refusal")
    text = "".join(text for kind, text in parts if kind in _TEXT)
    if text.strip():
        cut = cut_at(text, stops)
        # Stripped, as are other backends' texts.
        return Completion(endpoint.scrub(cut).strip(), reason if cut == text else "stop")
    return _without_text(message, parts, reason)


def _without_text(message: Mapping[str, Any], parts: Sequence[tuple[str, str]], reason: str | None) -> Completion:
    """Return the completion of a message without text, with the cause.

    Raises:
        TypeError: if the server does not say how it ended.
    """
    if message.get("reasoning_content") or message.get("reasoning") or any(kind not in _TEXT for kind, _ in parts):
        cause = f"the model reasoned but gave no answer (finish reason: {reason}); allow more new tokens"
        return Completion(None, reason, cause)
    if reason == "length":
        return Completion(None, reason, "the model used up its new tokens without an answer; allow more of them")
    if message.get("tool_calls") or message.get("function_call") or _CALLED.search(reason or ""):
        return Completion(None, reason, "the model called a tool and gave no answer")
    if reason is None and not parts:
        raise TypeError("no text")
    return Completion("", reason)


def _parts(content: Any) -> list[tuple[str, str]]:
    """Return kind and text of each part of a message's content, which may be a text, a list of parts, or none."""
    if content is None:
        return []
    found = []
    for part in [content] if isinstance(content, str | dict) else content:
        kind = "text" if isinstance(part, str) else part.get("type", "text")
        text = part if isinstance(part, str) else part.get(kind if kind == "refusal" else "text")
        found.append((kind, text if isinstance(text, str) else ""))
    return found


def _read_error(response: httpx.Response, body: str, endpoint: Endpoint) -> ServerError:
    status, headers = response.status_code, response.headers
    message, code, param = _error_fields(body)
    if status == 200:  # the error's code tells more, if it is a status
        status = int(code) if re.fullmatch(r"[45]\d\d", code) else 502
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
    if isinstance(body, list) and len(body) == 1:  # as Google's servers send it
        (body,) = body
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
