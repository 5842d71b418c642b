"""Every request ends once, as a completion or with a reason; no key gets anywhere but into a header.

A real server, of this process, plays the faults.
"""

import json
import logging
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from stub_server import PASSING, Request, StubServer, echo
from transformers import AutoTokenizer

from sails_align.core.errors import InputError
from sails_align.data.tokens import read_chat_template
from sails_align.evaluation.backends.endpoint import Endpoint
from sails_align.evaluation.backends.make import make_backend
from sails_align.evaluation.backends.openai import DOWN_AFTER, OpenAIBackend
from sails_align.evaluation.backends.stops import stops_of
from sails_align.evaluation.options import ResponseArguments
from sails_align.evaluation.records import Sampling
from sails_align.testbed.build import resolve_testbed

KEY = "sk-test-0123456789abcdef"
GREEDY = Sampling(max_new_tokens=16)
QUICK = {"backoff": 0.01, "timeout": 5.0}


@pytest.fixture(autouse=True)
def _no_key_and_no_proxy(monkeypatch):
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


class Rejecting(StubServer):
    """Answers prompts that hold a word with an error of its own."""

    def __init__(self, errors: dict[str, tuple[int, dict[str, str]]]) -> None:
        super().__init__(echo)
        self.errors = errors

    def _rejected(self, body):
        for word, (status, error) in self.errors.items():
            if word in body["prompt"]:
                return web.json_response({"error": error}, status=status)
        return None


def chats(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"text {number}"}] for number in range(count)]


def complete(server: StubServer, conversations, sampling: Sampling = GREEDY, **options) -> dict:
    backend = OpenAIBackend(server.base_url, "stub", **QUICK | options)
    try:
        pairs = list(backend.complete(conversations, sampling))
    finally:
        backend.close()
    assert sorted(index for index, _ in pairs) == list(range(len(conversations)))  # each exactly once
    return dict(pairs)


def one(server: StubServer, sampling: Sampling = GREEDY, **options):
    return complete(server, chats(1), sampling, **options)[0]


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_messages_and_texts_go_to_their_paths_with_the_sampling():
    schema = {"type": "object", "properties": {"score": {"type": "integer"}}}
    sampling = Sampling(max_new_tokens=7, temperature=0.5, seed=3, schema=schema)
    with StubServer(echo) as server:
        found = complete(server, [chats(1)[0], "[INST] raw [/INST]"], sampling)
    assert [found[0].text, found[1].text] == ["text 0", "[INST] raw [/INST]"]
    assert found[0].finish_reason == "stop"
    by_path = {request.path: request.body for request in server.requests}
    assert by_path["/v1/completions"]["prompt"] == "[INST] raw [/INST]"
    body = by_path["/v1/chat/completions"]
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (7, 0.5, 3)
    assert body["response_format"]["json_schema"] == {"name": "answer", "strict": True, "schema": schema}


def test_texts_that_are_no_unicode_survive():
    with StubServer(echo) as server:
        found = complete(server, ["zero-width \u200b, emoji \U0001f600, nul \x00, lone surrogate \ud800"])
    assert found[0].text == "zero-width \u200b, emoji \U0001f600, nul \x00, lone surrogate ?"


@pytest.mark.parametrize("fault", [*PASSING, "429_date", "null_content", "trickle", "hang"])
def test_each_fault_alone_is_got_over(fault):
    with StubServer(echo, script=[fault], retry_after=0, slow=0.3) as server:
        completion = one(server, timeout=0.6)
    assert completion.text == "text 0"
    assert completion.error is None
    assert len(server.requests) == (1 if fault in ("slow", "trickle") else 2)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("500", "status 500: The server had an error"),
        ("drop", "closed connection"),
        ("refuse", "disconnected"),
        ("truncated", "truncated or invalid JSON"),
        ("html", "text/html and not JSON"),
        ("wrong_shape", "no completion"),
        ("no_choices", "no completion"),
        ("hang", "no answer within 0.3 s"),
        ("trickle", "no answer within 0.3 s"),
    ],
)
def test_a_fault_that_stays_is_said_after_all_attempts(fault, cause):
    with StubServer(choose=lambda _: fault, slow=2.0) as server:
        completion = one(server, max_attempts=3, timeout=0.3)
    assert completion.text is None
    assert completion.error is not None
    assert completion.error.startswith("server error after 3 attempts: ")
    assert cause in completion.error
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault", ["429", "429_date"])
def test_retry_after_is_honoured(fault):
    with StubServer(echo, script=[fault], retry_after=2) as server:
        assert one(server).text == "text 0"
    first, second = (request.at for request in server.requests)
    assert 0.9 <= second - first < 4.0  # an HTTP date has whole seconds


def test_retry_after_is_capped(monkeypatch):
    monkeypatch.setattr("sails_align.evaluation.backends.answers.MAX_WAIT", 0.2)
    with StubServer(echo, script=["429"], retry_after=3600) as server:
        start = time.monotonic()
        assert one(server).text == "text 0"
        assert 0.2 <= time.monotonic() - start < 2.0


def test_rate_limits_use_up_patience_and_not_attempts():
    with StubServer(echo, script=["429"] * 6, retry_after=0) as server:
        assert one(server, max_attempts=2).text == "text 0"
        assert len(server.requests) == 7
    with StubServer(choose=lambda _: "429", retry_after=0) as server:
        completion = one(server, patience=0.3)
        assert completion.error is not None
        assert "status 429: Rate limit reached" in completion.error


@pytest.mark.parametrize(
    ("fault", "text", "finish_reason", "cause"),
    [
        ("content_filter", None, "content_filter", None),
        ("no_content_filter", None, "content_filter", None),
        ("filtered_part", None, "content_filter", None),
        ("filter_in_200", None, "content_filter", None),
        ("refusal", "I cannot help with that.", "refusal", None),
        ("refusal_part", "I cannot help with that.", "refusal", None),
        ("reasoning_only", None, "length", "reasoned but gave no answer"),
        ("thinking_part", None, "length", "reasoned but gave no answer"),
        ("no_content_length", None, "length", "used up its new tokens"),
        ("null_content_length", None, "length", "used up its new tokens"),
        ("tool_call", None, "tool_calls", "called a tool"),
        ("no_text", "", "stop", None),
        ("no_reason", "text 0", None, None),
        ("max_tokens_reason", "text 0", "length", None),
        ("parts", "text 0", "stop", None),
    ],
)
def test_the_finish_reason_decides_and_no_answer_is_asked_for_twice(fault, text, finish_reason, cause):
    with StubServer(echo, choose=lambda _: fault) as server:
        completion = one(server)
    assert (completion.text, completion.finish_reason) == (text, finish_reason)
    assert (cause or "") in (completion.error or "")
    assert (completion.error is None) == (cause is None)
    assert len(server.requests) == 1


def test_answers_without_text_do_not_take_the_server_down():
    odd = ["no_content_filter", "null_content_length", "tool_call", "no_text", "filter_in_200"]
    with StubServer(echo, script=odd * DOWN_AFTER) as server:
        found = complete(server, chats(len(odd) * DOWN_AFTER + 1), concurrency=1)
        assert len(server.requests) == len(found)
    assert found[len(odd) * DOWN_AFTER].text == f"text {len(odd) * DOWN_AFTER}"


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("error_reason", "status 502: the server broke the answer off (finish reason: error)"),
        ("error_in_choice", "status 502: The upstream host failed."),
        ("error_in_200", "status 502: The upstream host failed."),
    ],
)
def test_a_part_of_an_answer_is_none(fault, cause):
    with StubServer(echo, choose=lambda _: fault) as server:
        completion = one(server, max_attempts=2)
    assert completion.text is None
    assert completion.error == f"server error after 2 attempts: {cause}"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, [{"error": {"code": 400, "message": "Invalid value at 'properties[2].value.enum[0]' (TYPE_STRING), 1"}}]),
        (400, {"error": {"message": "additionalProperties is no field of this object"}}),
        (422, {"detail": [{"loc": ["body"], "msg": "Extra inputs"}]}),
        (500, {"error": {"message": "cannot compile the grammar"}}),
        (404, {"error": {"code": 404, "message": "No endpoints found that can handle the requested parameters."}}),
    ],
)
def test_a_server_that_takes_no_schema_is_asked_without_it(status, body, caplog):
    with StubServer(echo, schema_error=(status, body)) as server:
        found = complete(server, chats(3), Sampling(schema={"type": "object"}), concurrency=1, max_attempts=1)
    assert [found[index].text for index in range(3)] == ["text 0", "text 1", "text 2"]
    assert len(server.requests) == 4
    assert "does not support response_format" in caplog.text


def test_a_prompt_that_is_too_long_is_its_own_error():
    with StubServer(echo, max_chars=50) as server:
        found = complete(server, ["short", "long" * 50, "short too"])
    assert (found[0].text, found[2].text) == ("short", "short too")
    assert found[1].error is not None
    assert "maximum context length is 50" in found[1].error
    assert len(server.requests) == 3  # it is not tried again


@pytest.mark.parametrize(
    ("options", "lacking"),
    [
        (["seed"], {"seed"}),
        (["response_format"], {"response_format"}),
        (["temperature", "seed", "response_format"], {"temperature", "seed", "response_format"}),
        (["max_tokens"], {"max_tokens"}),
    ],
)
def test_options_a_server_does_not_know_are_left_out_from_then_on(options, lacking, caplog):
    sampling = Sampling(schema={"type": "object"})
    with StubServer(echo, unsupported=options) as server:
        backend = OpenAIBackend(server.base_url, "stub", concurrency=1, **QUICK)
        found = dict(backend.complete(chats(5), sampling))
        backend.close()
    assert [found[index].text for index in range(5)] == [f"text {index}" for index in range(5)]
    assert len(server.requests) == 5 + len(options)
    assert not lacking & server.requests[-1].body.keys()
    assert ("max_completion_tokens" in server.requests[-1].body) == ("max_tokens" in lacking)
    assert len(caplog.records) == len(options)  # said once


OPENERS = ["\n\nAssistant:", "\n\nHuman:"]


@pytest.mark.parametrize("unsupported", [[], ["stop"]], ids=["ignored", "refused"])
@pytest.mark.parametrize("asked", [[{"role": "user", "content": "how?"}], "\n\nHuman: how?\n\nAssistant:"])
def test_texts_that_end_a_response_are_sent_and_cut_off_where_a_server_goes_on(asked, unsupported):
    with StubServer(lambda _: " With glue.\n\nHuman: and then?\n\nAssistant: wait", unsupported=unsupported) as server:
        completion = complete(server, [asked], stops=OPENERS)[0]
    assert server.requests[0].body["stop"] == OPENERS
    assert len(server.requests) == 1 + len(unsupported)
    assert (completion.text, completion.finish_reason) == ("With glue.", "stop")


def test_texts_that_end_a_response_are_those_of_the_template_as_without_a_server(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(resolve_testbed("testbed").model_path)
    tokenizer.chat_template = read_chat_template("human_assistant")
    tokenizer.save_pretrained(tmp_path)
    assert sorted(stops_of(tokenizer, None).texts) == OPENERS
    at = {"backend": "openai", "base_url": "http://localhost:1/v1"}
    named = ResponseArguments(model="m", server_template="human_assistant", **at)
    for how in (named, ResponseArguments(model=str(tmp_path), **at)):
        assert sorted(make_backend(how, None, []).identity()["stops"]) == OPENERS
    assert "stops" not in make_backend(ResponseArguments(model="m", **at), None, []).identity()  # of earlier versions
    with pytest.raises(InputError, match="server_template is given without --backend openai"):
        ResponseArguments(server_template="human_assistant")


def test_an_option_is_not_given_up_for_an_error_that_names_it():
    quoting = "too long, and not supported: 'a text about seed, temperature, max_tokens and response_format'"

    with Rejecting({"quote": (400, {"message": quoting})}) as server:
        found = complete(server, ["quote", "fine"], Sampling(schema={"type": "object"}), concurrency=1)
    assert found[0].error is not None
    assert "too long" in found[0].error
    assert found[1].text == "fine"
    assert {"seed", "temperature", "max_tokens", "response_format"} <= server.requests[-1].body.keys()


def test_requests_with_faults_are_all_answered_and_not_mixed_up():
    kinds = [*PASSING, "429_date", "trickle"]
    with StubServer(echo, faults=0.05, kinds=kinds, retry_after=0, slow=0.2, latency=0.01) as server:
        found = complete(server, chats(1000), concurrency=32, backoff=0.05)
    assert Counter(completion.text for completion in found.values()) == Counter(
        f"text {number}" for number in range(1000)
    )
    assert all(found[index].text == f"text {index}" for index in range(1000))
    n_faults = sum(server.given.values()) - server.given["none"]
    assert 30 < n_faults < 90  # there were faults to get over
    assert 2 < server.max_in_flight <= 32


@pytest.mark.parametrize("concurrency", [1, 5])
def test_concurrency_is_limited_and_used(concurrency):
    with StubServer(echo, latency=0.05) as server:
        complete(server, chats(20), concurrency=concurrency)
    assert server.max_in_flight == concurrency


def test_some_poisoned_prompts_do_not_touch_the_others():
    def choose(request: Request) -> str | None:
        return "500" if request.asked.endswith("7") else None  # type: ignore[union-attr]

    with StubServer(echo, choose=choose) as server:
        found = complete(server, [str(number) for number in range(500)], max_attempts=2)
    failed = {index for index, completion in found.items() if completion.text is None}
    assert failed == {number for number in range(500) if number % 10 == 7}


def test_a_wrong_key_is_explained_and_not_shown(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with StubServer(key="another one") as server:
        with pytest.raises(InputError) as caught:
            one(server, api_key_env="MY_KEY")
        assert KEY not in "".join(traceback.format_exception(caught.value))
        assert "does not take the key in the environment variable MY_KEY (status 401" in str(caught.value)
        with pytest.raises(InputError, match=r"wants a key .*\n?.*OPENAI_API_KEY is not set"):
            one(server)
        assert len(server.requests) <= 2  # and not tried again


def test_a_wrong_model_is_answered_with_those_there_are():
    with StubServer(model="right") as server, pytest.raises(InputError, match="has no model 'stub';\nit has: right"):
        one(server)


def test_a_server_that_says_400_to_an_unknown_model_is_understood():
    with Rejecting({"": (400, {"message": "other is not a valid model ID"})}) as server:
        backend = OpenAIBackend(server.base_url, "other", **QUICK)
        with pytest.raises(InputError, match="has no model 'other';\nit has: stub"):
            list(backend.complete(["text"], GREEDY))


def test_prompts_that_hosts_filter_are_refused_and_not_errors():
    errors = {
        "azure": (400, {"message": "The response was filtered.", "code": "content_filter"}),
        "router": (403, {"message": "Your chosen model requires moderation and your input was flagged for harm."}),
    }
    with Rejecting(errors) as server:
        found = complete(server, ["azure", "router", "fine"])
    assert [found[index].finish_reason for index in range(3)] == ["content_filter", "content_filter", "stop"]
    assert [found[index].error for index in range(3)] == [None, None, None]


def test_an_account_without_money_is_not_waited_for():
    with Rejecting({"": (429, {"message": "You exceeded your quota.", "code": "insufficient_quota"})}) as server:
        with pytest.raises(InputError, match="You exceeded your quota"):
            complete(server, ["text"])
        assert len(server.requests) == 1


def test_a_wrong_path_or_an_unreachable_server_is_explained():
    with StubServer() as server:
        backend = OpenAIBackend(server.base_url + "/v7", "stub", **QUICK)
        with pytest.raises(InputError, match=r"does not answer requests for 'stub' .status 404.*\ncheck the URL"):
            list(backend.complete(chats(3), GREEDY))
    backend = OpenAIBackend(f"http://127.0.0.1:{closed_port()}/v1", "stub")
    start = time.monotonic()
    with pytest.raises(InputError, match=r"cannot reach http://127.0.0.1:\d+/v1 .*refused"):
        list(backend.complete(chats(3), GREEDY))
    assert time.monotonic() - start < 2.0


def test_no_thread_takes_back_that_a_server_was_reached():
    endpoint = Endpoint("https://nowhere.invalid/v1", "NO_SUCH_KEY", 1.0)

    class Event(str):
        def endswith(self, suffix: Any, *more: Any) -> bool:
            if suffix == "start_tls.complete":
                endpoint._was_reached = True  # by another thread, while this one looks
            return super().endswith(suffix, *more)

    endpoint._watch(threading.Event())(Event("connection.connect_tcp.complete"), {"return_value": threading.Event()})
    assert endpoint._was_reached
    endpoint.close()


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    with StubServer(echo) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.base_url.removesuffix("/v1"))
        backend = OpenAIBackend("http://nowhere.invalid/v1", "stub", **QUICK)
        assert [completion.text for _, completion in backend.complete(chats(1), GREEDY)] == ["text 0"]
        monkeypatch.setenv("HTTPS_PROXY", proxy.base_url.removesuffix("/v1"))  # which this one does not do
        backend = OpenAIBackend("https://nowhere.invalid/v1", "stub", **QUICK)
        with pytest.raises(InputError, match=r"cannot reach https://nowhere.invalid/v1 .*\n.*the proxy"):
            list(backend.complete(chats(1), GREEDY))
    monkeypatch.setenv("ALL_PROXY", "nonsense://name:secret-word@host")
    with pytest.raises(InputError, match="the environment sets a proxy") as caught:
        OpenAIBackend("http://localhost/v1", "stub")
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "name:secret-word@host/v1", "ftp://host/v1", "http://", "http://n:secret-word@h:x/v1"]
)
def test_a_url_that_is_none_is_an_error_without_its_password(url):
    with pytest.raises(InputError, match="give one like http://localhost:8000/v1") as caught:
        OpenAIBackend(url, "stub")
    assert "secret-word" not in str(caught.value)


def test_a_url_with_a_query_is_an_error_that_does_not_show_it():
    with pytest.raises(InputError, match="has a query") as caught:
        OpenAIBackend("http://host/v1?key=secret-word", "stub")
    assert "secret-word" not in str(caught.value)


def test_the_key_gets_into_the_header_and_nowhere_else(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in (None, "httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=name)
    with StubServer(lambda _: f"you said {KEY}", key=KEY, choose=lambda _: "echo_key") as server:
        backend = OpenAIBackend(server.base_url, "stub", max_attempts=2, **QUICK)
        ((_, failed),) = backend.complete(chats(1), GREEDY)
        server.choose = lambda _: None
        ((_, done),) = backend.complete(chats(1), GREEDY)
    assert {request.authorization for request in server.requests} == {f"Bearer {KEY}"}
    assert failed.error is not None
    assert "Authorization: Bearer [secret]" in failed.error  # the server did echo it
    assert done.text == "you said [secret]"
    assert any(record.name.startswith("httpcore") for record in caplog.records)
    shown = [
        caplog.text,
        repr(failed),
        repr(done),
        repr(backend),
        repr(backend._endpoint),
        json.dumps(backend.identity()),
    ]
    assert not any(KEY in text for text in shown)


def test_a_password_in_the_url_is_sent_and_not_shown(caplog):
    caplog.set_level(logging.DEBUG)
    with StubServer(choose=lambda _: "echo_key") as server:
        url = server.base_url.replace("//", "//name:secret-word@")
        backend = OpenAIBackend(url, "stub", max_attempts=1, **QUICK)
        ((_, failed),) = backend.complete(chats(1), GREEDY)
    assert server.requests[0].authorization == "Basic bmFtZTpzZWNyZXQtd29yZA=="
    assert failed.error is not None
    assert "Basic [secret]" in failed.error
    assert backend.identity() == {"backend": "openai", "base_url": server.base_url, "model": "stub"}
    assert "secret-word" not in caplog.text


@pytest.mark.parametrize("key", ["two words", "line\nend", "schlüssel"])
def test_a_key_that_is_none_is_an_error_without_it(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY holds blanks") as caught:
        OpenAIBackend("http://localhost/v1", "stub")
    assert key not in str(caught.value)


def test_a_placeholder_for_a_key_is_not_cut_out_of_texts(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    with StubServer(lambda _: "EMPTY words") as server:
        assert one(server).text == "EMPTY words"
    assert server.requests[0].authorization == "Bearer EMPTY"


def test_a_dead_server_is_given_up_and_tried_again_by_the_next_call():
    with StubServer(echo, choose=lambda _: "503") as server:
        backend = OpenAIBackend(server.base_url, "stub", concurrency=8, max_attempts=3, **QUICK)
        found = dict(backend.complete(chats(2000), GREEDY))
        assert len(found) == 2000
        assert all(completion.text is None for completion in found.values())
        assert sum("server is down" in (completion.error or "") for completion in found.values()) > 1900
        assert DOWN_AFTER * 3 <= len(server.requests) <= (DOWN_AFTER + 8) * 3
        before = len(server.requests)
        assert len(dict(backend.complete(chats(100), GREEDY))) == 100
        assert len(server.requests) - before <= 16 * 3  # one failure is enough then
        server.choose = lambda _: None
        assert {completion.text for _, completion in backend.complete(chats(1), GREEDY)} == {"text 0"}
        backend.close()


def test_a_server_that_dies_on_the_way_ends_the_rest():
    with StubServer(echo) as server:
        backend = OpenAIBackend(server.base_url, "stub", concurrency=4, max_attempts=2, **QUICK)
        pairs = backend.complete(chats(500), GREEDY)
        first = [next(pairs) for _ in range(10)]
        server.choose = lambda _: "refuse"
    found = dict([*first, *pairs])
    assert sorted(found) == list(range(500))
    assert any(completion.text for completion in found.values())
    assert sum("server is down" in (completion.error or "") for completion in found.values()) > 100


def wait_until(condition, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_consumer_that_stops_cancels_what_waits_and_what_runs():
    def choose(request: Request) -> str | None:
        return None if request.asked == "0" else "hang"

    with StubServer(echo, choose=choose) as server:
        backend = OpenAIBackend(server.base_url, "stub", concurrency=4, timeout=60.0)
        pairs = backend.complete([str(number) for number in range(1000)], GREEDY)
        assert next(pairs)[1].text == "0"
        assert wait_until(lambda: server.in_flight == 4)
        start = time.monotonic()
        pairs.close()
        assert time.monotonic() - start < 0.5
        assert wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("openai")])
        assert time.monotonic() - start < 2.0
        assert len(server.requests) == 5  # none came after
        assert wait_until(lambda: server.in_flight == 0)
        server.choose = lambda _: None  # and the backend can go on
        assert [completion.text for _, completion in backend.complete(["again"], GREEDY)] == ["again"]


def test_ctrl_c_leaves_no_lock_behind_whenever_it_comes():
    """Threads that wait for a lock of the interrupted one would never end, and the process would wait for them."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with StubServer(choose=lambda _: "hang") as server:
            backend = OpenAIBackend(server.base_url, "stub")

            def ask(seconds: float) -> None:
                # Once more after two seconds: Python loses an interrupt that comes in the middle of a destructor.
                signal.setitimer(signal.ITIMER_REAL, seconds, 2.0)
                list(backend.complete(["text"] * 5000, GREEDY))

            for step in range(40):
                with pytest.raises(KeyboardInterrupt):
                    ask(0.001 * (step + 1))
                signal.setitimer(signal.ITIMER_REAL, 0.0)
                assert wait_until(
                    lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("openai")]
                )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def test_ctrl_c_ends_the_process_at_once(tmp_path: Path):
    script = tmp_path / "ask.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from sails_align.core.errors import exit_on_input_error
        from sails_align.evaluation.backends.openai import OpenAIBackend
        from sails_align.evaluation.records import Sampling
        with exit_on_input_error():
            list(OpenAIBackend(sys.argv[1], "stub").complete(["text"] * 1000, Sampling()))
        """)
    )
    with StubServer(choose=lambda _: "hang") as server:
        process = subprocess.Popen([sys.executable, str(script), server.base_url], stderr=subprocess.PIPE, text=True)
        assert wait_until(lambda: server.in_flight == 16, 20.0)
        start = time.monotonic()
        process.send_signal(2)
        errors = process.communicate(timeout=10)[1]
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert time.monotonic() - start < 3.0
