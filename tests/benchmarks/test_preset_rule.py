"""The rule that decides whether the preset `default` is replaced, on made results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from processes import PATIENCE


def made_cell(folder: Path, run: str, seed: int, refusal: float) -> None:
    """Write the result of a tuning cell whose answers are all alike."""
    numbers = {"refusal_rate": {"value": refusal}, "likeness": {"value": 0.5}}
    cell = {"run": run, "seed": seed, "part": "validation", "learning_rate": 0.01}
    (folder / f"{run}-{seed}.json").write_text(json.dumps({"cell": cell, "numbers": numbers}))


def test_a_candidate_is_dropped_on_the_first_seed_or_compared_on_all(tmp_path: Path) -> None:
    refusals = {"sft-sails": [0.5, 0.6, 0.7], "mode-init": [0.6, 0.8, 0.8], "tokens-all": [0.4, 0.9, 0.9]}
    dropped = ("sft-sails-paper", "layers-sae", "not-whitened", "score-attribution")
    for run in (*dropped, "score-read-write", "k-16", "k-256", "rank-4"):
        refusals[run] = [0.5]
    for run, of in refusals.items():
        for place, refusal in enumerate(of):
            made_cell(tmp_path, run, 1000 + place, refusal)
    output = tmp_path / "found" / "rule.json"
    command = [sys.executable, "benchmarks/preset_rule.py", "--cells", str(tmp_path), "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=PATIENCE)
    found = json.loads(output.read_text())
    difference = found["mode-init"]["minus_default"]
    assert difference["value"] == pytest.approx((0.1 + 0.2 + 0.1) / 3 / 2)
    assert difference["ci_low"] < difference["value"] < difference["ci_high"]
    assert [name for name, of in found.items() if of.get("minus_default")] == ["mode-init"]
