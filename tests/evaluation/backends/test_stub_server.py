"""The server that other tests rely on does what it is told."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from paths import TESTS
from stub_server import FAULTS, PASSING, Request, StubServer, echo, score

CLIENT = httpx.Client()  # making one takes longer than a hundred requests
SERVER = TESTS / "stub_server.py"


def ask(server: StubServer, text: str = "hello", timeout: float = 5.0, **fields) -> httpx.Response:
    body = {"model": "stub", "messages": [{"role": "user", "content": text}]} | fields
    return CLIENT.post(f"{server.base_url}/chat/completions", json=body, timeout=timeout)


def test_it_answers_chats_texts_and_what_models_it_has():
    with StubServer(echo) as server:
        assert ask(server, "hi").json()["choices"][0]["message"] == {"role": "assistant", "content": "hi"}
        text = CLIENT.post(f"{server.base_url}/completions", json={"model": "stub", "prompt": "ho"}).json()
        assert text["choices"][0]["text"] == "ho"
        assert CLIENT.get(f"{server.base_url}/models").json()["data"][0]["id"] == "stub"
    assert [request.asked for request in server.requests] == [[{"role": "user", "content": "hi"}], "ho"]


def test_scores_depend_on_the_text_alone_and_take_all_values():
    scores = [json.loads(score(f"text {number}"))["score"] for number in range(200)]
    assert set(scores) == {1, 2, 3, 4, 5}
    assert scores == [json.loads(score(f"text {number}"))["score"] for number in range(200)]


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        ("429", 429, "application/json"),
        ("500", 500, "application/json"),
        ("503", 503, "application/json"),
        ("html", 200, "text/html"),
        ("truncated", 200, "application/json"),
    ],
)
def test_a_script_of_faults_is_played_once(fault, status, kind):
    with StubServer(script=[fault, None]) as server:
        bad, good = ask(server), ask(server)
    assert bad.status_code == status
    assert bad.headers["content-type"].startswith(kind)
    assert good.status_code == 200
    assert json.loads(good.json()["choices"][0]["message"]["content"])["score"]
    assert server.given == {fault: 1, "none": 1}


def test_connections_are_dropped_and_left_hanging():
    with StubServer(script=["drop", "refuse", "hang"]) as server:
        for _ in range(2):
            with pytest.raises(httpx.RemoteProtocolError):
                ask(server)
        with pytest.raises(httpx.ReadTimeout):
            ask(server, timeout=0.2)
    assert server.in_flight == 0  # a client that leaves ends its request


def test_faults_come_at_their_rate_and_depend_on_the_request_not_on_the_order():
    def given(order: list[int]) -> tuple[dict[int, int], int]:
        with StubServer(faults=0.3, kinds=["500", "503"], seed=3) as server, ThreadPoolExecutor(8) as executor:
            statuses = executor.map(lambda number: ask(server, f"text {number}").status_code, order)
            return dict(zip(order, statuses, strict=True)), sum(server.given[kind] for kind in ("500", "503"))

    forwards, n_faults = given(list(range(200)))
    assert 35 <= n_faults <= 85
    assert given(list(reversed(range(200)))) == (forwards, n_faults)


def test_it_wants_its_key_and_model_and_no_options_it_does_not_know():
    with StubServer(key="right", unsupported=["seed"], max_chars=10) as server:
        assert ask(server).status_code == 401
        headers = {"Authorization": "Bearer right"}

        def status(**body) -> int:
            return CLIENT.post(f"{server.base_url}/completions", json=body, headers=headers).status_code

        assert status(model="stub", prompt="hi") == 200
        assert status(model="other", prompt="hi") == 404
        assert status(model="stub", prompt="hi", seed=0) == 400
        assert status(model="stub", prompt="much too long") == 400
    assert server.requests[-1].authorization == "Bearer right"


def test_it_can_choose_a_fault_by_what_is_asked():
    def choose(request: Request) -> str | None:
        return "500" if "poison" in request.asked[-1]["content"] else None

    with StubServer(choose=choose) as server:
        assert ask(server, "poison").status_code == 500
        assert ask(server, "water").status_code == 200


def test_unknown_faults_are_an_error():
    with pytest.raises(ValueError, match="no such faults: \\['509'\\]"):
        StubServer(script=["509"])
    assert set(PASSING) < set(FAULTS)


def test_as_a_process_it_prints_its_url_first_and_counts():
    command = [sys.executable, str(SERVER), "--answer", "echo", "--latency", "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            body = {"model": "stub", "prompt": "hi"}
            # httpx's pool closes idle connections beyond its limit, at times one that another thread is about to use.
            limits = httpx.Limits(max_keepalive_connections=32)
            with httpx.Client(base_url=url, limits=limits) as client, ThreadPoolExecutor(32) as executor:
                answers = list(executor.map(lambda _: client.post("/completions", json=body).json(), range(500)))
                stats = client.get(url.removesuffix("/v1") + "/stats").json()
            assert {answer["choices"][0]["text"] for answer in answers} == {"hi"}
            assert stats["requests"] == 500
            assert 1 < stats["max_in_flight"] <= 32
        finally:
            process.send_signal(signal.SIGINT)
    assert process.returncode == 0
