"""`--report_to` of evaluations: TensorBoard has the numbers of `metrics.json`, and a table of the responses."""

import json
from pathlib import Path

import pytest
from events import Events

from sails_align.cli.evaluate import attack, divergence, harness, helpfulness, safety
from sails_align.core.errors import InputError
from sails_align.evaluation.metrics import as_numbers


def argv(folder: Path, *more: str) -> list[str]:
    files = ["--output_dir", str(folder / "out"), "--cache_path", str(folder / "cache.sqlite"), "--progress", "false"]
    return [*files, "--n_prompts", "3", *more]


def test_rates_differences_and_responses(tmp_path: Path) -> None:
    metrics = safety(argv(tmp_path, "--compare", "testbed", "--report_to", "tensorboard"))
    events = Events(tmp_path / "out" / "tensorboard")
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())["overall"]
    expected = as_numbers(metrics["overall"], "overall/")
    for category, rates in metrics["by_category"].items():
        expected |= as_numbers(rates, f"by_category/{category}/")
    for part in ("compared", "difference"):
        expected |= as_numbers({name: row[part] for name, row in comparison.items()}, f"{part}/")
    sent = {name: value for name, values in events.scalars().items() for value in values.values()}
    assert {"overall/safety_rate", "overall/safety_rate_low", "difference/safety_rate_high"} <= sent.keys()
    # TensorBoard allows fewer marks in names.
    assert sorted(sent.values()) == pytest.approx(sorted(expected.values()))
    assert len(sent) == len(expected)
    rows = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    for name in ("responses", "compared/responses"):
        text = events.texts()[name]
        assert text.startswith(f"{len(rows)} of {len(rows)} rows")
        assert all(row["response"].split()[0] in text for row in rows)


def test_attacks_and_divergence_send_their_numbers(tmp_path: Path) -> None:
    attack(["prefill", *argv(tmp_path / "attack", "--report_to", "tensorboard")])
    events = Events(tmp_path / "attack" / "out" / "tensorboard")
    assert {"attacks/none/attack_success_rate", "attacks/all/attack_success_rate"} <= events.scalars().keys()
    assert "responses" in events.texts()
    divergence(argv(tmp_path / "divergence", "--base", "testbed", "--report_to", "tensorboard"))
    assert Events(tmp_path / "divergence" / "out" / "tensorboard").scalars()["overall/kl_per_token"] == {0: 0.0}


def test_scores_of_the_harness_are_sent(tmp_path: Path) -> None:
    options = ["--model", "testbed", "--tasks", "testbed_facts", "--limit", "4", "--output_dir", str(tmp_path / "out")]
    harness([*options, "--report_to", "tensorboard"])
    assert any(name.startswith("model/testbed_facts/acc") for name in Events(tmp_path / "out/tensorboard").scalars())


def test_they_change_no_result(tmp_path: Path) -> None:
    first = helpfulness(argv(tmp_path))
    made_by = (tmp_path / "out" / "made_by.json").read_bytes()
    assert not (tmp_path / "out" / "tensorboard").exists()
    assert helpfulness(argv(tmp_path, "--report_to", "tensorboard")) == first
    assert (tmp_path / "out" / "made_by.json").read_bytes() == made_by
    assert "overall/correct_answer_rate" in Events(tmp_path / "out" / "tensorboard").scalars()


def test_an_unknown_service_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="report_to is tensor, which is unknown or not installed"):
        safety(argv(tmp_path, "--report_to", "tensor"))
    assert not list(tmp_path.iterdir())
