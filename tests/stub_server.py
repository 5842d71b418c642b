"""A small OpenAI-compatible server that answers at once, late, wrongly or not at all: for tests and benchmarks.

    with StubServer(echo, script=["429", "500"]) as server:      # in this process, on a thread of its own
        ... server.base_url, server.requests, server.max_in_flight

    python tests/stub_server.py --port 0 --latency 0.05 --faults 0.05 --seed 0 --answer score     # its own process

The command prints its URL as the first line. GET /stats tells what it was asked for.
"""

import argparse
import asyncio
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

from aiohttp import web

Asked = list[dict[str, str]] | str
"""The messages of a chat, or the prompt of a text completion."""
Answer = Callable[[Asked], str]

FAULTS = (
    "429",  # with Retry-After in seconds
    "429_date",  # with Retry-After as an HTTP date
    "500",
    "503",
    "hang",  # no answer for `hang` seconds
    "drop",  # the connection closes in the middle of the body
    "refuse",  # the connection closes before an answer
    "truncated",  # a body of the right length that is half a JSON document
    "trickle",  # the right answer after a blank every 0.05 s for `slow` seconds
    "slow",  # the right answer, `slow` seconds late
    "html",  # 200, but a web page
    "wrong_shape",  # 200 and JSON, but something else
    "no_choices",
    "null_content",  # finish reason null, too
    "reasoning_only",  # null content beside reasoning_content, finish reason "length"
    "content_filter",
    "filtered_part",  # part of a text, finish reason "SAFETY"
    "no_content_filter",  # a message without content, finish reason "content_filter"
    "no_content_length",
    "null_content_length",
    "no_text",  # null content, finish reason "stop"
    "refusal",
    "refusal_part",  # in a list of parts
    "tool_call",
    "error_reason",  # part of a text, finish reason "error"
    "error_in_choice",  # part of a text, and an error beside it
    "error_in_200",  # no choices, and an error of code 502 with status 200
    "filter_in_200",  # no choices, and an error of code 403 that says moderation, with status 200
    "no_reason",  # the right answer, finish reason null
    "max_tokens_reason",  # the right answer, finish reason "MAX_TOKENS"
    "parts",  # the right answer as a list of parts, after one of thinking
    "thinking_part",  # a part of thinking alone, finish reason "length"
    "echo_key",  # 500 with the Authorization header in its body
)
PASSING = (
    "429", "500", "503", "drop", "refuse", "truncated", "slow", "html", "wrong_shape", "no_choices",
    "error_reason", "error_in_choice", "error_in_200",
)  # fmt: skip
"""Faults after which asking again helps, and that come at once."""

ODD: dict[str, dict[str, Any]] = {
    "null_content": {"content": None, "finish_reason": None},
    "reasoning_only": {"content": None, "reasoning_content": "Let me think.", "finish_reason": "length"},
    "content_filter": {"content": None, "finish_reason": "content_filter"},
    "filtered_part": {"content": "Sure. Step 1: take", "finish_reason": "SAFETY"},
    "no_content_filter": {"finish_reason": "content_filter"},
    "no_content_length": {"finish_reason": "length"},
    "null_content_length": {"content": None, "finish_reason": "length"},
    "no_text": {"content": None},
    "refusal": {"content": None, "refusal": "I cannot help with that."},
    "refusal_part": {"content": [{"type": "refusal", "refusal": "I cannot help with that."}]},
    "tool_call": {"content": None, "tool_calls": [{"id": "1"}], "finish_reason": "tool_calls"},
    "error_reason": {"content": "Sure. Step 1: take", "finish_reason": "error"},
    "error_in_choice": {"content": "Sure. Step 1: take"},
    "no_reason": {"finish_reason": None},
    "max_tokens_reason": {"finish_reason": "MAX_TOKENS"},
    "thinking_part": {"content": [{"type": "thinking", "thinking": "Let me"}], "finish_reason": "length"},
}
"""Fields of the choice and the message of answers with status 200, by fault."""
ODD_ERRORS = {
    "error_in_200": {"code": 502, "message": "The upstream host failed."},
    "filter_in_200": {"code": 403, "message": "Your input was flagged by moderation."},
}


def text_of(asked: Asked) -> str:
    """All that was asked, as one text."""
    return asked if isinstance(asked, str) else "\n".join(message["content"] for message in asked)


def digest_of(text: str) -> int:
    """A number that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")


def echo(asked: Asked) -> str:
    """The last thing said."""
    return asked if isinstance(asked, str) else asked[-1]["content"]


def score(asked: Asked) -> str:
    """A judge's verdict: 1 to 5, by a hash of the text."""
    value = digest_of(text_of(asked)) % 5 + 1
    return json.dumps({"score": value, "explanation": f"this deserves a {value}"})


ANSWERS: dict[str, Answer] = {"echo": echo, "score": score}


@dataclass(frozen=True)
class Request:
    """What the server was asked."""

    path: str
    authorization: str | None
    body: dict[str, Any]
    at: float
    """Seconds (monotonic)."""

    @property
    def asked(self) -> Asked:
        """Messages or prompt."""
        return self.body["messages"] if "messages" in self.body else self.body["prompt"]


class StubServer:
    """The server.

    Args:
        answer: text for what was asked.
        latency: seconds that each answer takes.
        faults: share of the requests that go wrong. It depends on the seed, the request's body and on how often this
            body came, not on the order in which requests arrive.
        kinds: of the faults by share.
        script: fault (or None) for the first requests, in the order in which they arrive.
        choose: fault (or None) for a request, instead of `script` and `faults`.
        key: that requests must carry; None takes any.
        unsupported: names of options that are answered by 400.
        schema_error: status and body of the answer to requests with a response_format; None takes them.
        max_chars: longer conversations are answered by 400.
        retry_after: seconds, of 429.
    """

    def __init__(
        self,
        answer: Answer = score,
        *,
        model: str = "stub",
        latency: float = 0.0,
        faults: float = 0.0,
        kinds: Sequence[str] = PASSING,
        script: Sequence[str | None] = (),
        choose: Callable[[Request], str | None] | None = None,
        seed: int = 0,
        key: str | None = None,
        unsupported: Sequence[str] = (),
        schema_error: tuple[int, Any] | None = None,
        max_chars: int | None = None,
        retry_after: int = 1,
        hang: float = 3600.0,
        slow: float = 0.5,
        port: int = 0,
    ) -> None:
        unknown = {*kinds, *(name for name in script if name)} - set(FAULTS)
        if unknown:
            raise ValueError(f"no such faults: {sorted(unknown)}; there are {', '.join(FAULTS)}")
        self.answer, self.model, self.latency, self.key = answer, model, latency, key
        self.faults, self.kinds, self.seed, self.choose = faults, tuple(kinds), seed, choose
        self.unsupported, self.max_chars = tuple(unsupported), max_chars
        self.schema_error = schema_error
        self.retry_after, self.hang, self.slow, self.port = retry_after, hang, slow, port
        self.requests: list[Request] = []
        self.given: Counter[str] = Counter()
        """Faults by name, and "none"."""
        self.in_flight = 0
        self.max_in_flight = 0
        self._script = list(script)
        self._times_asked: Counter[int] = Counter()

    @property
    def base_url(self) -> str:
        """For OpenAI clients."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "StubServer":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner = asyncio.run_coroutine_threadsafe(self.start(), self._loop).result(30)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def start(self) -> web.AppRunner:
        """Listen, in the running event loop."""
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/stats", self._stats)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        # A client that goes away ends its request, as it does with real servers.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, backlog=1024)
        await site.start()
        self.port = runner.addresses[0][1]
        return runner

    async def _models(self, request: web.Request) -> web.Response:
        refused = self._refused(request.headers.get("Authorization"))
        return refused or web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _stats(self, _: web.Request) -> web.Response:
        stats = {"requests": len(self.requests), "max_in_flight": self.max_in_flight, "faults": dict(self.given)}
        return web.json_response(stats)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            authorization = request.headers.get("Authorization")
            asked = Request(request.path, authorization, await request.json(), time.monotonic())
            self.requests.append(asked)
            if refused := self._refused(authorization) or self._rejected(asked.body):
                return refused
            fault = self._fault(asked)
            self.given[fault or "none"] += 1
            if self.latency:
                await asyncio.sleep(self.latency)
            return await self._faulty(request, asked, fault) if fault else _json(self._completion(asked))
        finally:
            self.in_flight -= 1

    def _refused(self, authorization: str | None) -> web.Response | None:
        if self.key is None or authorization == f"Bearer {self.key}":
            return None
        return _error(401, f"Incorrect API key provided: {authorization}.", code="invalid_api_key")

    def _rejected(self, body: dict[str, Any]) -> web.Response | None:
        if body.get("model") != self.model:
            return _error(404, f"The model `{body.get('model')}` does not exist.", code="model_not_found")
        for option in self.unsupported:
            if option in body:
                message = f"Unsupported parameter: '{option}' is not supported with this model."
                return _error(400, message, code="unsupported_parameter", param=option)
        if self.schema_error and "response_format" in body:
            status, answer = self.schema_error
            return web.json_response(answer, status=status)
        length = len(text_of(body.get("messages") or body.get("prompt", "")))
        if self.max_chars is not None and length > self.max_chars:
            message = f"This model's maximum context length is {self.max_chars}, but the prompt has {length}."
            return _error(400, message, code="context_length_exceeded", param="messages")
        return None

    def _fault(self, asked: Request) -> str | None:
        if self.choose is not None:
            return self.choose(asked)
        if self._script:
            return self._script.pop(0)
        if not self.faults:
            return None
        body = digest_of(json.dumps(asked.body, sort_keys=True))
        self._times_asked[body] += 1
        number = digest_of(f"{self.seed} {body} {self._times_asked[body]}")
        if number % 1_000_003 >= self.faults * 1_000_003:
            return None
        return self.kinds[number // 1_000_003 % len(self.kinds)]

    def _completion(self, asked: Request, **changes: Any) -> dict[str, Any]:
        """An answer as OpenAI's API has it; `changes` are fields of the choice, or of the message in it."""
        text = self.answer(asked.asked)
        choice: dict[str, Any] = {"index": 0, "finish_reason": changes.pop("finish_reason", "stop")}
        if "messages" in asked.body:
            choice["message"] = {"role": "assistant", "content": text, **changes}
        else:
            choice["text"] = changes.get("content", text)
        usage = {"prompt_tokens": len(text_of(asked.asked).split()), "completion_tokens": len(text.split())}
        return {"id": "stub", "object": "chat.completion", "model": self.model, "choices": [choice], "usage": usage}

    async def _faulty(self, request: web.Request, asked: Request, fault: str) -> web.StreamResponse:
        if fault in ("hang", "slow"):
            await asyncio.sleep(self.hang if fault == "hang" else self.slow)
            return _json(self._completion(asked))
        if fault == "trickle":
            return await _trickle(request, json.dumps(self._completion(asked)), self.slow)
        if fault in ("drop", "refuse"):
            return await _drop(request, json.dumps(self._completion(asked)) if fault == "drop" else "")
        if fault == "echo_key":
            return _error(500, f"cannot handle headers: Authorization: {asked.authorization}")
        if fault in ("429", "429_date"):
            seconds = str(self.retry_after)
            after = seconds if fault == "429" else formatdate(time.time() + self.retry_after, usegmt=True)
            return _error(429, "Rate limit reached.", headers={"Retry-After": after})
        if fault in ("500", "503"):
            return _error(int(fault), "The server had an error while processing your request.")
        return self._odd(asked, fault)

    def _odd(self, asked: Request, fault: str) -> web.Response:
        """Answers with status 200 that are none."""
        if fault == "html":
            return web.Response(text="<html><body>Please log in.</body></html>", content_type="text/html")
        if fault == "truncated":
            whole = json.dumps(self._completion(asked))
            return web.Response(text=whole[: len(whole) // 2], content_type="application/json")
        if fault == "wrong_shape":
            return _json({"result": ["fine"]})
        completion = self._completion(asked, **ODD.get(fault, {}))
        (choice,) = completion["choices"]
        if fault in ("error_in_200", "filter_in_200"):
            return _json({"error": ODD_ERRORS[fault]})
        if fault == "no_choices":
            return _json(completion | {"choices": []})
        if fault == "error_in_choice":
            choice["error"] = {"code": 502, "message": "The upstream host failed."}
        if fault.startswith("no_content"):
            del choice["message"]["content"]
        if fault == "parts":
            content = [{"type": "thinking", "thinking": []}, {"type": "text", "text": self.answer(asked.asked)}]
            choice["message"]["content"] = content
        return _json(completion)


def _json(value: Any) -> web.Response:
    return web.Response(body=json.dumps(value).encode(), content_type="application/json")


def _error(status: int, message: str, *, headers: dict[str, str] | None = None, **fields: str) -> web.Response:
    return web.json_response({"error": {"message": message, **fields}}, status=status, headers=headers)


async def _drop(request: web.Request, text: str) -> web.StreamResponse:
    """Close the connection after half of the text; with none, before any answer."""
    transport = request.transport
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(text))})
    if text:
        await response.prepare(request)
        await response.write(text[: len(text) // 2].encode())
    if transport is not None:
        transport.close()
    return response


async def _trickle(request: web.Request, text: str, seconds: float) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await response.write(b" ")
        await asyncio.sleep(0.05)
    await response.write(text.encode())
    return response


async def _serve(server: StubServer) -> None:
    runner = await server.start()
    try:
        print(server.base_url, flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="stub")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=PASSING)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answer", choices=sorted(ANSWERS), default="score")
    options = vars(parser.parse_args())
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(StubServer(ANSWERS[options.pop("answer")], **options)))


if __name__ == "__main__":
    main()
