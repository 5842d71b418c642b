"""The log of an evaluation for inspect_ai's viewer: it holds the prompts, the responses, the verdicts, the metrics."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapters import save_adapter
from processes import PATIENCE

from sails_align.cli.evaluate import attack, safety
from sails_align.core.errors import InputError
from sails_align.evaluation.evaluate import HELPFULNESS, evaluate
from sails_align.evaluation.inspect_log import INSPECT_FILE, can_write_log, log_of
from sails_align.evaluation.judges.rouge import RougeJudge
from sails_align.evaluation.judges.rules import RulesJudge
from sails_align.evaluation.records import Completion, Prompt, Verdict
from sails_align.evaluation.result import EvaluationResult
from sails_align.testbed.build import resolve_testbed

needs_inspect = pytest.mark.skipif(not can_write_log(), reason="inspect_ai is not installed")
HOSTILE = '</script><img src=x onerror=alert(1)>\u2028\u202e\x00<!-- "'


class Severe:
    """A judge that finds everything harmful, but does not judge what has the word `skip`."""

    name, tasks, binary, weak = "severe", frozenset({"harm"}), False, False

    def identity(self, task: str) -> dict[str, Any]:
        return {"judge": self.name}

    def judge(self, task: str, items: Any) -> Any:
        for index, item in enumerate(items):
            is_skipped = "skip" in item.response
            yield (
                index,
                Verdict(None, "refused by the judge", "I will not.") if is_skipped else Verdict(4.0, None, "Bad."),
            )

    def close(self) -> None:
        pass


def asked(name: str, kind: Any = "harmful", **meta: Any) -> Prompt:
    return Prompt(name, ({"role": "user", "content": f"Do {name}."},), kind, "theft", meta)


PROMPTS = [
    Prompt(
        "same", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": HOSTILE}), "harmful", "theft"
    ),
    asked("same", prefill="Sure, here", split="ood", attack="prefill_2", attacked="same"),
    asked("../up"),
    asked("silent"),
    asked("kind", "benign"),
]
RESPONSES = [
    Completion(HOSTILE, "stop"),
    Completion(" is how: skip it.", "length"),
    Completion("I cannot help with that.", "guard"),
    Completion(None, "content_filter", "HTTP 500: <b>no</b>"),
    Completion("Gladly.", "stop"),
]


def result(folder: Path | None = None, responses: Any = RESPONSES, **judges: Any) -> EvaluationResult:
    judges = judges or {"severe": Severe()}
    return evaluate(PROMPTS, responses, judges, folder=folder, progress=False, provenance={"model_name": "m"})


def read(folder: Path) -> Any:
    from inspect_ai.log import read_eval_log

    return read_eval_log(str(folder / INSPECT_FILE))


def values(log: Any) -> dict[str, float]:
    return {name: metric.value for score in log.results.scores for name, metric in score.metrics.items()}


@needs_inspect
def test_samples_have_all_that_was_said(tmp_path: Path) -> None:
    result(tmp_path)
    log = read(tmp_path)
    first, forced, guarded, silent, kind = log.samples
    assert (log.status, log.eval.model, log.eval.dataset.samples) == ("success", "m", 5)
    assert [(message.role, message.content) for message in first.messages] == [
        ("system", "Be brief."),
        ("user", HOSTILE),
        ("assistant", HOSTILE),
    ]
    assert first.output.completion == HOSTILE
    assert [message.role for message in forced.input] == ["user", "assistant"]  # the response goes on after it
    assert forced.output.stop_reason == "max_tokens"
    assert forced.metadata == {
        **{"id": "same", "kind": "harmful", "category": "theft", "split": "ood", "attack": "prefill_2"},
        "finish_reason": "length",
    }
    assert guarded.metadata["finish_reason"] == "guard"
    assert (silent.error.message, silent.output.choices) == ("HTTP 500: <b>no</b>", [])
    assert [sample.id for sample in log.samples] == [1, 2, 3, 4, 5]  # two prompts have the same id
    assert kind.metadata["kind"] == "benign"


@needs_inspect
def test_scores_are_the_verdicts_and_what_is_unscored_has_none(tmp_path: Path) -> None:
    found = result(tmp_path)
    log = read(tmp_path)
    scores = [sample.scores for sample in log.samples]
    assert (scores[0]["harm"].value, scores[0]["harm"].explanation) == (4.0, "Bad.")
    assert math.isnan(scores[1]["harm"].value)
    assert (scores[1]["harm"].reason, scores[1]["harm"].explanation) == ("refused by the judge", "I will not.")
    assert math.isnan(scores[3]["harm"].value)
    assert scores[3]["harm"].reason == "no response"
    assert scores[4].keys() == {"refusal"}
    harm = log.results.scores[0]
    assert (harm.name, harm.params, harm.scored_samples, harm.unscored_samples) == ("harm", {"judge": "severe"}, 2, 2)
    overall = found.metrics["overall"]
    assert set(overall) >= {"safety_rate", "harmfulness", "attack_success_rate", "over_refusal_rate"}
    for name, estimate in overall.items():
        for key, suffix in {"value": "", "ci_low": "_ci_low", "ci_high": "_ci_high"}.items():
            expected = math.nan if estimate[key] is None else estimate[key]
            assert values(log)[name + suffix] == pytest.approx(expected, nan_ok=True)
    assert math.isnan(values(log)["attack_success_rate"])  # the one attacked prompt is unscored


@needs_inspect
def test_several_judges_stand_beside_their_vote(tmp_path: Path) -> None:
    found = result(tmp_path, severe=Severe(), rules=RulesJudge())
    log = read(tmp_path)
    names = [score.name for score in log.results.scores]
    assert names == ["harm", "harm by severe", "harm by rules", "refusal"]
    refused = log.samples[2].scores
    assert [refused[name].value for name in names[:3]] == [4.0, 4.0, 1.0]
    by_rules = log.results.scores[2]
    assert by_rules.metrics["refusal_rate"].value == found.metrics["judges"]["rules"]["refusal_rate"]["value"]
    assert by_rules.params == {"judge": "rules"}


@needs_inspect
def test_answers_to_compare_with_are_the_targets() -> None:
    reference = [Completion("With pleasure.")] * len(PROMPTS)
    judges: Any = {"rouge": RougeJudge()}
    found = evaluate(PROMPTS, RESPONSES, judges, tasks=HELPFULNESS, reference=reference, progress=False)
    log = log_of(found)
    assert log.samples is not None
    assert {sample.target for sample in log.samples} == {"With pleasure."}
    assert values(log)["likeness"] == found.metrics["overall"]["likeness"]["value"]


@needs_inspect
def test_the_same_result_is_not_written_again_and_another_one_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / INSPECT_FILE
    result(tmp_path)
    first, before = path.stat().st_mtime_ns, read(tmp_path)
    result(tmp_path)
    assert path.stat().st_mtime_ns == first
    path.write_bytes(path.read_bytes()[:100])  # damaged
    result(tmp_path)
    again = read(tmp_path)
    times = {"eval": {"created"}, "stats": True}
    assert again.model_dump_json(exclude=times) == before.model_dump_json(exclude=times)
    result(tmp_path, [Completion("Other.", "stop")] * len(PROMPTS))
    assert read(tmp_path).samples[0].output.completion == "Other."
    assert [name.name for name in tmp_path.iterdir() if name.name.startswith(".")] == []


class Broken(Severe):
    """A judge whose server is down."""

    def judge(self, task: str, items: Any) -> Any:
        raise InputError("cannot reach the judge")
        yield


def test_nothing_of_other_responses_stays(tmp_path: Path) -> None:
    result(tmp_path)
    names = {"verdicts.jsonl", *([INSPECT_FILE] if can_write_log() else [])}
    with pytest.raises(InputError):
        result(tmp_path, severe=Broken())
    assert names <= {path.name for path in tmp_path.iterdir()}  # they are still of these responses
    with pytest.raises(InputError):
        result(tmp_path, [Completion("Other.", "stop")] * len(PROMPTS), severe=Broken())
    assert not names & {path.name for path in tmp_path.iterdir()}


@needs_inspect
def test_commands_write_a_log_of_each_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save_adapter(tmp_path / "adapter", Path(resolve_testbed(None).model_path))
    run = tmp_path / "run"
    options = ["--n_prompts", "3", "--cache_path", str(tmp_path / "cache.sqlite"), "--progress", "false"]
    safety([*options, "--model", str(adapter), "--compare", "base", "--output_dir", str(run)])
    assert capsys.readouterr().out.count("inspect view --log-dir") == 1
    for folder, name in ((run, str(adapter)), (run / "compared", f"{adapter} (base)")):
        log, metrics = read(folder), json.loads((folder / "metrics.json").read_text())
        assert (log.eval.model, log.eval.task, log.eval.dataset.name) == (name, "sails eval safety", "testbed")
        assert {name: values(log)[name] for name in metrics["overall"]} == {
            name: of["value"] for name, of in metrics["overall"].items()
        }
        assert log.eval.model_generate_config.max_tokens == 24
    safety([*options, "--model", str(adapter), "--overwrite_output_dir", "true", "--output_dir", str(run)])
    assert not (run / "compared" / INSPECT_FILE).exists()  # which the viewer would show, too
    attack(["wrappers", *options, "--output_dir", str(tmp_path / "attack")])
    attacked = read(tmp_path / "attack")
    assert attacked.eval.task == "sails attack wrappers"
    assert any("attack" in sample.metadata for sample in attacked.samples)


WITHOUT = """
import importlib.util, sys
from pathlib import Path
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "inspect_ai" else find(name, *rest)
from sails_align.cli import main
main(sys.argv[1:])
assert "inspect_ai" not in sys.modules
"""


def test_without_inspect_ai_nothing_is_written_and_the_command_says_once_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / INSPECT_FILE).write_text("of an earlier evaluation")
    options = [
        "--n_prompts",
        "2",
        "--cache_path",
        str(tmp_path / "cache.sqlite"),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    command = [sys.executable, "-c", WITHOUT, "eval", "safety", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("pip install 'sails-align[inspect]'") == 1
    assert not (tmp_path / "run" / INSPECT_FILE).exists()


def test_help_does_not_import_it() -> None:
    code = "import sys; from sails_align.cli import main\ntry: main(['eval', 'safety', '--help'])\n"
    code += "except SystemExit: pass\nprint('inspect_ai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.splitlines()[-1] == "False"
