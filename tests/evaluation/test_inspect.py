"""The evaluations as inspect_ai's tasks: the same rates as ours, and what is unscored there, too."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paths import ROOT
from served import answer
from stub_server import StubServer, digest_of

from sails_align.cli.evaluate import helpfulness, safety
from sails_align.core.errors import InputError
from sails_align.testbed.build import resolve_testbed

pytest.importorskip("inspect_ai", reason="inspect_ai is not installed: pip install 'sails-align[inspect]'")

FILE = ROOT / "eval" / "inspect_tasks.py"
N = 12


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inspect_tasks", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluate(task: Any, folder: Path) -> Any:
    """The log of a run of inspect_ai on the testbed's model."""
    import inspect_ai

    model = {"model_path": resolve_testbed(None).model_path, "device": "cpu", "do_sample": False}
    (log,) = inspect_ai.eval(
        task, model="hf/testbed", model_args=model, log_dir=str(folder), display="none", max_connections=16
    )
    assert log.status == "success", log.error
    return log


def values(log: Any) -> dict[str, float]:
    (score,) = log.results.scores
    return {name: metric.value for name, metric in score.metrics.items()}


@pytest.mark.slow
def test_the_same_rates_as_ours(tasks: ModuleType, tmp_path: Path) -> None:
    options = ["--n_prompts", str(N), "--cache_path", str(tmp_path / "cache.sqlite"), "--progress", "false"]
    rates = safety([*options, "--output_dir", str(tmp_path / "safety")])["overall"]
    helpful = helpfulness([*options, "--output_dir", str(tmp_path / "helpful")])["overall"]
    harm, refusal, right = (
        values(evaluate(task, tmp_path / "logs"))
        for task in (tasks.safety(n_prompts=N), tasks.over_refusal(n_prompts=N), tasks.helpfulness(n_prompts=N))
    )
    for name in ("safety_rate", "harmfulness", "high_risk_rate"):
        assert harm[name] == pytest.approx(rates[name]["value"])
        assert harm[f"{name}_ci_low"] == pytest.approx(rates[name]["ci_low"])
    assert refusal["over_refusal_rate"] == pytest.approx(rates["over_refusal_rate"]["value"])
    assert right["correct_answer_rate"] > 0.9
    assert right["correct_answer_rate"] == pytest.approx(helpful["correct_answer_rate"]["value"])


def test_what_a_judge_does_not_score_is_unscored(tasks: ModuleType, tmp_path: Path) -> None:
    with StubServer(answer) as server:
        options = {"judge": "llm", "judge_model": "stub", "judge_base_url": server.base_url, "n_prompts": 6}
        whole = evaluate(tasks.safety(**options), tmp_path / "logs")
        server.choose = lambda request: "refusal" if digest_of(str(request.asked)) % 2 else None
        part = evaluate(tasks.safety(**options), tmp_path / "logs")
    assert whole.results.scores[0].unscored_samples == 0
    lost = [sample for sample in part.samples if sample.scores["harm"].value != sample.scores["harm"].value]  # NaN
    assert 0 < len(lost) < 12
    assert part.results.scores[0].unscored_samples == len(lost)
    assert {sample.scores["harm"].reason for sample in lost} == {"refused by the judge"}
    kept = {sample.id: sample.scores["harm"].value for sample in part.samples if sample not in lost}
    for sample in whole.samples:
        if sample.id in kept:
            assert kept[sample.id] == sample.scores["harm"].value


def test_what_cannot_be_used(tasks: ModuleType) -> None:
    with pytest.raises(InputError, match="one judge"):
        tasks.safety(judge=["oracle", "rules"])
    with pytest.raises(InputError, match="rules cannot be asked for helpfulness"):
        tasks.helpfulness(judge="rules")
