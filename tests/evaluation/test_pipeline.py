"""Evaluations end to end: nothing is asked twice, nothing is lost, and what was not scored is not hidden."""

import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT, TESTS
from processes import PATIENCE
from served import answer
from stub_server import PASSING, StubServer

from sails_align.cli import compare as comparing
from sails_align.cli.evaluate import harness, helpfulness, safety
from sails_align.core.errors import InputError
from sails_align.evaluation.backends.openai import OpenAIBackend
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.judges.llm import LlmJudge, questions
from sails_align.evaluation.judges.rubrics import HARM
from sails_align.evaluation.output import default_folder
from sails_align.evaluation.pipeline import verdicts_of
from sails_align.evaluation.prompts.load import split_of
from sails_align.evaluation.records import Item, Prompt
from sails_align.evaluation.tables import heading_on_set
from sails_align.models.resolve import resolve_model
from sails_align.testbed.build import resolve_testbed

N = 40


@pytest.fixture
def server() -> Iterator[StubServer]:
    with StubServer(answer) as running:
        yield running


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of harmful and harmless prompts."""
    rows = [
        {
            "prompt": f"please do thing {index}",
            "kind": ("harmful", "benign", "dual_use")[index % 3],
            "category": f"category {index % 4}",
        }
        for index in range(N)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def argv(server: StubServer, asked: Path, folder: Path, **more: Any) -> list[str]:
    options: dict[str, Any] = {
        "model": "stub",
        "backend": "openai",
        "base_url": server.base_url,
        "prompts": asked,
        "judge": "llm",
        "judge_model": "stub",
        "judge_base_url": server.base_url,
        "output_dir": folder,
        "cache_path": folder.parent / "cache.sqlite",
        "progress": "false",
        **more,
    }
    given = {name: str(value).split(" ") for name, value in options.items() if value is not None}
    return [word for name, words in given.items() for word in (f"--{name}", *words)]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_is_asked_and_judged_once(server: StubServer, prompts: Path, tmp_path: Path) -> None:
    metrics = safety(argv(server, prompts, tmp_path / "run"))
    responses, verdicts = rows(tmp_path / "run" / "responses.jsonl"), rows(tmp_path / "run" / "verdicts.jsonl")
    assert len(responses) == N
    assert all(row["response"] for row in responses)
    votes = [row for row in verdicts if row["judge"] == "vote"]
    harm = [row["score"] for row in votes if row["task"] == "harm"]
    refusals = [row["score"] for row in votes if row["task"] == "refusal"]
    assert len(harm) == sum(row["kind"] == "harmful" for row in responses) == 14
    assert len(harm) + len(refusals) == N
    overall = metrics["overall"]
    assert overall["safety_rate"]["value"] == pytest.approx(sum(score <= 2 for score in harm) / len(harm))
    assert overall["harmfulness"]["value"] == pytest.approx(sum(harm) / len(harm))
    assert overall["over_refusal_rate"]["value"] == pytest.approx(sum(refusals) / len(refusals))
    assert set(metrics["by_category"]) == {f"category {n}{kind}" for n in range(4) for kind in _suffixes()}
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["overall"] == overall
    assert len(server.requests) == 2 * N


def _suffixes() -> tuple[str, ...]:
    return "", " (benign)", " (dual_use)"


def test_a_rerun_costs_no_call_and_changes_nothing(server: StubServer, prompts: Path, tmp_path: Path) -> None:
    first = safety(argv(server, prompts, tmp_path / "run"))
    written = (tmp_path / "run" / "verdicts.jsonl").read_bytes()
    n_calls = len(server.requests)
    second = safety(argv(server, prompts, tmp_path / "other"))
    assert len(server.requests) == n_calls
    assert second["overall"] == first["overall"]
    assert (tmp_path / "other" / "verdicts.jsonl").read_bytes() == written
    # What decides a verdict is in its key: other sampling gives other responses.
    safety(argv(server, prompts, tmp_path / "third", max_new_tokens=7))
    assert len(server.requests) == n_calls + N  # of responses; they read the same here, and so do their verdicts
    safety(argv(server, prompts, tmp_path / "fourth", judge_max_new_tokens=77))
    assert len(server.requests) == n_calls + 2 * N


def test_unscored_is_counted_bounded_and_asked_again_only_on_request(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = True

    def judged(asked: Any) -> str:
        text = answer(asked)
        is_verdict = text.startswith("{")
        return "I would rather not say." if broken and is_verdict and text[-2] in "45" else text

    with StubServer(judged) as server:
        options = argv(server, prompts, tmp_path / "run")
        with pytest.raises(SystemExit) as ended:
            safety(options)
        assert ended.value.code == 1
        assert "verdicts on harm are unscored (unparsable verdict:" in capsys.readouterr().err
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        harmful = metrics["overall"]["safety_rate"]
        n_lost = harmful["n_unscored"]
        assert n_lost > 0
        assert harmful["n"] + n_lost == 14
        n_safe = harmful["value"] * harmful["n"]
        assert harmful["bound_low"] == pytest.approx(n_safe / 14)
        assert harmful["bound_high"] == pytest.approx((n_safe + n_lost) / 14)
        lost = [row for row in rows(tmp_path / "run" / "verdicts.jsonl") if row["score"] is None]
        assert {row["reason"] for row in lost} == {"unparsable verdict"}

        n_calls = len(server.requests)
        safety([*options, "--max_unscored", "1"])  # the same failures, without a call
        assert len(server.requests) == n_calls
        broken = False
        metrics = safety([*options, "--retry-unscored"])
        assert len(server.requests) == n_calls + n_lost
        assert metrics["unscored"]["n"] == 0
        assert (
            metrics["overall"]["safety_rate"]["value"] < harmful["value"]
        )  # those that were lost were the harmful ones


def test_no_response_is_unscored_and_not_judged(prompts: Path, tmp_path: Path) -> None:
    def choose(request: Any) -> str | None:
        return "content_filter" if "thing 3" in str(request.body["messages"]) else None

    with StubServer(answer, choose=choose) as server:
        metrics = safety(argv(server, prompts, tmp_path / "run", max_unscored=1))
        assert metrics["unscored"]["reasons"] == {"no response": 11}  # thing 3, and 30 to 39
        assert len(server.requests) == N + N - 11


def test_a_served_adapter_that_changes_nothing_is_taken_to_be_ignored(
    server: StubServer, prompts: Path, tmp_path: Path
) -> None:
    """Which this one is: the model is asked under the same name with and without it."""
    options = argv(server, prompts, tmp_path / "run", base_model="stub")
    with pytest.raises(InputError, match="adapter is ignored: 8 greedy texts are the same"):
        safety(options)
    assert len(server.requests) == 16
    assert not (tmp_path / "run").exists()

    safety(argv(server, prompts, tmp_path / "whole"))  # all answers are in the cache now,
    n_calls = len(server.requests)
    safety(options)  # so that nothing is asked, nor checked
    assert len(server.requests) == n_calls


def test_no_prompts_is_an_error(server: StubServer, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(InputError, match="empty"):
        safety(argv(server, tmp_path / "none.jsonl", tmp_path / "run"))


@pytest.mark.slow
def test_killed_at_any_point_it_loses_no_verdict(prompts: Path, tmp_path: Path) -> None:
    random.seed(0)
    with StubServer(answer, latency=0.02) as server:
        options = argv(server, prompts, tmp_path / "run", concurrency=4, judge_concurrency=4)
        safety(argv(server, prompts, tmp_path / "whole", cache_path=tmp_path / "another.sqlite"))
        n_needed = len(server.requests)
        delays = [round(random.uniform(0.02, 0.25), 3) for _ in range(20)]
        command = [sys.executable, TESTS / "killed_evaluation.py", json.dumps(delays), *options]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
        outcome = json.loads(ended.stdout.splitlines()[-1])
        assert outcome["exit"] == 0, ended.stderr
        assert outcome["killed"] >= 5, "the delays are too long for this machine"
        n_calls = len(server.requests) - n_needed
    # Asked again is at most what was under way, of which each kill finds 4 at most.
    assert n_needed <= n_calls <= n_needed + 4 * outcome["killed"]
    for name in ("responses.jsonl", "verdicts.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_share_a_cache(prompts: Path, tmp_path: Path) -> None:
    with StubServer(answer, latency=0.01) as server:
        commands = [
            [sys.executable, ROOT / "eval" / "safety.py", *argv(server, prompts, tmp_path / name)]
            for name in ("one", "two")
        ]
        running = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) for command in commands]
        for process in running:
            _, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, errors.decode()
        n_calls = len(server.requests)
        assert n_calls <= 4 * N
        metrics = safety(argv(server, prompts, tmp_path / "three"))
        assert len(server.requests) == n_calls
    for name in ("one", "two"):
        assert json.loads((tmp_path / name / "metrics.json").read_text())["overall"] == metrics["overall"]


def test_a_key_reaches_the_server_and_nothing_else(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "sk-this-must-not-be-seen"
    monkeypatch.setenv("JUDGE_KEY", secret)
    with StubServer(answer, key=secret) as server:
        keys = {"api_key_env": "JUDGE_KEY", "judge_api_key_env": "JUDGE_KEY"}
        safety(argv(server, prompts, tmp_path / "run", **keys))
        assert all(request.authorization == f"Bearer {secret}" for request in server.requests)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".jsonl", ".json", ".sqlite"}
    for path in files:
        assert secret.encode() not in path.read_bytes(), path
    printed = capfd.readouterr()
    assert secret not in printed.out + printed.err


@pytest.mark.slow
def test_five_thousand_verdicts_of_a_failing_server_are_all_scored_or_accounted_for(tmp_path: Path) -> None:
    user = [{"role": "user", "content": f"do thing {index}"} for index in range(5000)]
    items = [Item(Prompt(str(n), (turn,), "harmful", "all"), f"response {n}") for n, turn in enumerate(user)]
    asked = [questions(HARM, item)[0] for item in items]
    lasting = ["content_filter", "reasoning_only"]  # which are answers, and asking again is not tried
    with StubServer(answer, faults=0.05, kinds=[*PASSING, *lasting], retry_after=0, slow=0.2) as server:
        judge = LlmJudge(OpenAIBackend(server.base_url, "stub", concurrency=32, backoff=0.05))
        with closing(Cache(tmp_path / "cache.sqlite")) as cache:
            verdicts = verdicts_of(judge, "harm", items, cache, progress=False)
            n_faults = sum(server.given.values()) - server.given["none"]
            n_lost, n_calls = sum(server.given[fault] for fault in lasting), len(server.requests)
            again = verdicts_of(judge, "harm", items, cache, progress=False, retry_failed=True)
        assert server.max_in_flight <= 32
    assert 180 < n_faults < 350  # there was something to get over
    unscored = [index for index, verdict in enumerate(verdicts) if verdict.score is None]
    assert 20 < len(unscored) == n_lost
    assert {verdicts[index].reason for index in unscored} == {"refused by the judge", "unparsable verdict"}
    assert n_lost <= len(server.requests) - n_calls < 2 * n_lost
    for verdict, question in zip(again, asked, strict=True):
        if verdict.score is not None:
            assert verdict.score == json.loads(answer(list(question.conversation)))["score"]
    assert sum(verdict.score is None for verdict in again) < n_lost / 4


def test_several_judges_vote_and_their_agreement_is_told(
    server: StubServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = safety(argv(server, prompts, tmp_path / "run", judge="llm rules"))
    assert set(metrics["judges"]) == {"llm", "rules"}
    assert metrics["judges"]["rules"]["refusal_rate"]["value"] == 0  # no response is a refusal
    assert "safety_rate" not in metrics["judges"]["rules"]
    verdicts = rows(tmp_path / "run" / "verdicts.jsonl")
    by_judge = {
        name: {row["id"]: row["score"] for row in verdicts if row["judge"] == name and row["task"] == "harm"}
        for name in ("llm", "rules", "vote")
    }
    for name, score in by_judge["vote"].items():
        assert score == max(by_judge["llm"][name], by_judge["rules"][name])  # of two, the worse one
    agreement = metrics["agreement"]["harm"]
    assert set(agreement) == {"cohen_kappa", "krippendorff_alpha"}
    printed = capsys.readouterr().out
    assert "Krippendorff's alpha" in printed
    assert "weak evidence" in printed
    assert "harmfulness" not in metrics["overall"]  # the votes are 1 and 5 only
    assert "harm: rules can tell only safe from unsafe; harmfulness and high-risk are those of llm alone" in printed
    graded = f"{metrics['judges']['llm']['harmfulness']['value']:.2f}"
    assert re.search(rf"harmfulness \(1-5\), llm +│ +{graded} ", printed)
    assert re.search(r"refusal rate \(%\), rules +│ +0.0 ", printed)
    assert re.search(r"│ safety rate \(%\) +│", printed)


def test_each_judge_has_its_own_model_server_and_key(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_ONE", "the-key-of-one")
    monkeypatch.setenv("KEY_TWO", "the-key-of-two")
    servers = [
        StubServer(answer, model="one", key="the-key-of-one"),
        StubServer(lambda asked: "safe", model="llama-guard-3", key="the-key-of-two"),
        StubServer(answer),
    ]
    with servers[0] as one, servers[1] as guard, servers[2] as model:
        both = {
            "judge": "llm guard",
            "judge_model": "one llama-guard-3",
            "judge_base_url": f"{one.base_url} {guard.base_url}",
            "judge_api_key_env": "KEY_ONE KEY_TWO",
        }
        metrics = safety(argv(model, prompts, tmp_path / "run", **both))
        assert len(one.requests) == N  # harm and refusal
        assert len(guard.requests) == 14  # harm alone
        assert metrics["judges"]["guard"] == {"safety_rate": {**metrics["judges"]["guard"]["safety_rate"], "value": 1}}
        assert metrics["judges"]["llm"]["safety_rate"]["value"] < 1
        two = {**both, "judge": "llm llm", "judge_model": "one two", "judge_base_url": one.base_url}
        with pytest.raises(InputError, match="has no model 'two'"):
            safety(argv(model, prompts, tmp_path / "two", **{**two, "judge_api_key_env": "KEY_ONE"}))


def test_what_is_unscored_of_one_task_does_not_hide_behind_another(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def choose(request: Any) -> str | None:
        return "refusal" if "You grade how far" in str(request.body) and "thing 9" in str(request.body) else None

    with StubServer(answer, choose=choose) as server, pytest.raises(SystemExit) as ended:
        safety(argv(server, prompts, tmp_path / "run", max_unscored=0.05))
    assert ended.value.code == 1  # 1 of 14, and not 1 of 40
    assert "1 of 14 verdicts on harm are unscored (refused by the judge: 1)" in capsys.readouterr().err


def test_the_testbed_by_default(tmp_path: Path) -> None:
    """Without options: the testbed's model, prompts and oracle."""
    options = ["--output_dir", str(tmp_path / "run"), "--cache_path", str(tmp_path / "cache.sqlite")]
    metrics = safety([*options, "--n_prompts", "24", "--progress", "false"])
    assert metrics["overall"]["safety_rate"]["value"] == 0  # the base answers everything
    assert metrics["overall"]["correct_answer_rate"]["value"] > 0.9
    assert metrics["by_split"]["ood"]["safety_rate"]["n"] == 24
    assert metrics["unscored"]["n"] == 0
    helpful = helpfulness(
        [
            *options,
            "--n_prompts",
            "24",
            "--progress",
            "false",
            "--reference",
            "set",
            "--output_dir",
            str(tmp_path / "h"),
        ]
    )
    assert helpful["overall"]["correct_answer_rate"]["value"] == metrics["overall"]["correct_answer_rate"]["value"]
    assert helpful["overall"]["win_rate"]["value"] == pytest.approx(0.5, abs=0.05)  # against the right answers


def test_helpfulness_against_a_reference_in_both_orders(server: StubServer, prompts: Path, tmp_path: Path) -> None:
    metrics = helpfulness(argv(server, prompts, tmp_path / "run"))
    n = 26  # harmless prompts
    assert metrics["overall"]["helpfulness"]["n"] == n
    earlier = tmp_path / "run" / "responses.jsonl"
    n_calls = len(server.requests)
    compared = helpfulness(argv(server, prompts, tmp_path / "compared", reference=earlier))
    assert len(server.requests) == n_calls + 2 * n  # both orders
    wins = [row for row in rows(tmp_path / "compared" / "verdicts.jsonl") if row["task"] == "preference"]
    assert {row["score"] for row in wins} <= {0.0, 0.5, 1.0}
    assert compared["overall"]["win_rate"]["n"] == n
    earlier.write_text(earlier.read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match="has no answer to 25 of 26 prompts"):
        helpfulness(argv(server, prompts, tmp_path / "again", reference=earlier))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": "hf"}, "--base_url is given without --backend openai"),
        ({"judge": "nonsense"}, "judge is 'nonsense'"),
        (
            {"judge": "oracle", "judge_model": None, "judge_base_url": None},
            "the oracle knows the testbed's requests only",
        ),
        ({"judge": "oracle"}, "oracle is given, and 1 --judge_model"),
        ({"judge": "llm guard"}, "llm, guard is given, and 1 --judge_model"),
        ({"judge": "llm llm", "judge_model": "stub stub"}, "the judge llm:stub is given twice"),
        ({"judge_api_key_env": "A B"}, "judge_api_key_env has 2 values for 1 models"),
        ({"max_unscored": 2}, "max_unscored is 2.0"),
        ({"judge": "rules rules", "judge_model": None, "judge_base_url": None}, "the judge rules is given twice"),
        ({"guard_family": "wildguard"}, "no judge is a guard"),
        ({"prompts": "testbed testbed"}, "a prompt set is given twice"),
        ({"temperature": 1e-300}, "temperature is 1e-300"),
        ({"output_dir": "/tmp/" + "x" * 300}, "choose a shorter path"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"prompts": "no-such-set"}, "no-such-set"),
        ({"temperature": "nan"}, "temperature is nan"),
        ({"cache_path": "/proc/cache"}, "cannot use the cache /proc/cache"),
    ],
)
def test_what_cannot_be_used(
    server: StubServer, prompts: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        safety(argv(server, prompts, tmp_path / "run", **options))


def test_a_cache_of_something_else_is_refused(server: StubServer, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "cache.sqlite").write_text(
        "this is no data base, but a text that is long enough to be seen as one\n" * 50
    )
    with pytest.raises(InputError, match=r"cannot use the cache .*: file is not a database"):
        safety(argv(server, prompts, tmp_path / "run"))


@pytest.mark.slow
def test_scripts_end_with_exit_code_2(tmp_path: Path) -> None:
    for script in ("safety.py", "helpfulness.py"):
        command = [sys.executable, ROOT / "eval" / script, "--model", str(tmp_path / "nothing")]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ})
        assert ended.returncode == 2
        assert "error: " in ended.stderr
        assert "Traceback" not in ended.stderr
        assert not list(tmp_path.iterdir())


def test_an_outage_of_one_judge_does_not_hide_behind_another(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def choose(request: Any) -> str | None:
        return "refusal" if "You grade how far" in str(request.body) else None

    with StubServer(answer, choose=choose) as server, pytest.raises(SystemExit) as ended:
        safety(argv(server, prompts, tmp_path / "run", judge="llm rules"))
    assert ended.value.code == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["overall"]["safety_rate"]["n_unscored"] == 0  # the weak judge has scored all
    assert metrics["unscored"]["by_task"]["harm by llm"]["n"] == 14
    printed = capsys.readouterr()
    assert "14 of 14 verdicts on harm by llm are unscored" in printed.err
    assert "14 of 14 verdicts on harm by llm" in printed.out


def test_a_reference_is_paired_by_what_was_asked(tmp_path: Path) -> None:
    """Prompts of other seeds have the same ids on the testbed."""
    options = ["--n_prompts", "8", "--progress", "false", "--cache_path", str(tmp_path / "cache.sqlite")]
    helpfulness([*options, "--output_dir", str(tmp_path / "one")])
    reference = ["--reference", str(tmp_path / "one" / "responses.jsonl"), "--output_dir", str(tmp_path / "two")]
    metrics = helpfulness([*options, *reference])
    assert metrics["overall"]["win_rate"]["value"] == 0.5
    assert metrics["provenance"]["reference"]["sha256"]
    assert metrics["provenance"]["sampling"]["seed"] == 0
    with pytest.raises(InputError, match="has no answer to"):
        helpfulness([*options, *reference, "--seed", "1", "--overwrite_output_dir", "true"])


def test_a_changed_template_is_another_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve_testbed(None).model_path, folder)
    before = resolve_model(str(folder)).identity
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert resolve_model(str(folder)).identity != before


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="runs/mine holds neither a model"):
        resolve_model("runs/mine")


def test_folders_by_default_tell_checkpoints_of_two_runs_apart() -> None:
    names = ("runs/a/checkpoint-100", "runs/b/checkpoint-100/", "testbed:1", "google/gemma-2-2b")
    assert [default_folder("safety", name) for name in names] == [
        "runs/eval-safety-a-checkpoint-100",
        "runs/eval-safety-b-checkpoint-100",
        "runs/eval-safety-testbed-1",
        "runs/eval-safety-gemma-2-2b",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompts: []", "no prompts are given"),
        ("judge: []", "judge is empty"),
        ("model: null", "no model is given"),
        ("model: [a, b]", r"model is \['a', 'b'\], but it must be a text"),
        ("output_dir: {a: b}", "output_dir is {'a': 'b'}, but it must be a text"),
    ],
)
def test_files_of_options_that_make_no_sense(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        safety(["--config", str(tmp_path / "config.yaml")])


def test_results_do_not_go_into_the_folder_of_a_training(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "metrics.json").write_text("of the training")
    for main in (safety, helpfulness, harness, comparing.main):
        with pytest.raises(InputError, match="holds a model or a training"):
            main(["--output_dir", str(tmp_path)])
    assert (tmp_path / "metrics.json").read_text() == "of the training"


def test_a_data_base_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE things (name TEXT)")
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(InputError, match="the data base of something else") as error:
        Cache(path)
    assert "delete" not in str(error.value)
    assert path.read_bytes() == before


def test_why_there_are_no_responses_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The testbed's template takes no system message."""
    options = ["--n_prompts", "2", "--system_prompt", "be kind", "--progress", "false"]
    options += ["--cache_path", str(tmp_path / "cache.sqlite"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        safety(options)
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert "no response to 8 of 8 prompts: the chat template of " in err
    assert "the testbed model knows the roles user and assistant only" in err


@pytest.mark.parametrize("config", ["[]", '{"model_type": "foo"}', '{"model_type": "gemma2", "hidden_size": "big"}'])
def test_a_model_with_a_damaged_configuration(tmp_path: Path, config: str) -> None:
    shutil.copytree(resolve_testbed(None).model_path, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(config)
    with pytest.raises(InputError, match="cannot load the model"):
        resolve_model(str(tmp_path / "model"))


def test_a_base_model_is_asked_by_the_template_that_is_given(tmp_path: Path) -> None:
    testbed, base = resolve_testbed(None), tmp_path / "base"
    shutil.copytree(testbed.model_path, base)
    (base / "chat_template.jinja").unlink()
    options = ["--model", str(base), "--prompts", "testbed", "--n_prompts", "4", "--progress", "false"]
    options += ["--cache_path", str(tmp_path / "cache.sqlite"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match=r"has no chat template(.|\n)*--chat_template_path"):
        safety(options)
    template = Path(testbed.model_path) / "chat_template.jinja"
    metrics = safety([*options, "--chat_template_path", str(template)])
    assert metrics["overall"]["correct_answer_rate"]["value"] == 1.0
    other = tmp_path / "other.jinja"
    other.write_text(template.read_text().replace("message['content']", "'where is it kept ?'"))
    replacing = ["--overwrite_output_dir", "true"]
    changed = safety([*options, *replacing, "--chat_template_path", str(other)])  # and not taken from the cache
    assert changed["overall"]["correct_answer_rate"]["value"] < 1.0
    with pytest.raises(InputError, match="only a Jinja file"):
        safety([*options, "--chat_template_path", "google/gemma-2-2b-it"])
    (tmp_path / "hello.jinja").write_text("hello")
    with pytest.raises(InputError, match="is no chat template"):
        safety([*options, "--chat_template_path", str(tmp_path / "hello.jinja")])
    with pytest.raises(InputError, match="cannot read the chat template"):
        safety([*options, "--chat_template_path", "none.jinja"])
    with pytest.raises(InputError, match="a server has its own template"):
        safety(["--backend", "openai", "--base_url", "http://x/v1", "--chat_template_path", str(template)])


def test_rates_of_each_prompt_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, n in (("one", 4), ("two", 6)):
        rows = [{"prompt": f"{name} {index}", "kind": "harmful", "category": "c"} for index in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]
    options = ["--model", "testbed", "--prompts", *files, "--judge", "rules", "--progress", "false"]
    options += ["--cache_path", str(tmp_path / "cache.sqlite"), "--output_dir", str(tmp_path / "run")]
    metrics = safety(options)
    assert {name: of["refusal_rate"]["n"] for name, of in metrics["by_split"].items()} == {files[0]: 4, files[1]: 6}
    rows = [json.loads(line) for line in (tmp_path / "run" / "responses.jsonl").read_text().splitlines()]
    assert {row["meta"]["split"] for row in rows} == set(files)
    printed = capsys.readouterr().out
    assert re.search(r"refusal rate \(%\), one.jsonl +│", printed)
    assert "safety rate" not in printed  # rules alone do not know what is safe


def test_a_path_with_an_equals_sign_is_not_cut() -> None:
    assert split_of("runs/lr=0.1/mine.jsonl") == "runs/lr=0.1/mine.jsonl"
    assert split_of("xs_test=copies/x.csv") == "xstest"


def test_two_files_of_one_name_are_told_apart() -> None:
    labels = [heading_on_set("safety_rate", name, ["a/x.csv", "b/x.csv", "ood"]) for name in ("a/x.csv", "ood")]
    assert labels == ["safety rate (%), a/x.csv", "safety rate (%), held-out categories"]
