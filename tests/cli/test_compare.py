"""A comparison end to end: real trainings, side by side; killed and gone on with; and a page that people can read."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, needs_chromium
from made_results import result
from paths import RECIPES, ROOT
from processes import PATIENCE

from sails_align.cli import compare as comparing
from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.experiments.launchers import Local
from sails_align.experiments.plan import RUNS, Cell, Measures, Plan, Run
from sails_align.experiments.results import Results, read_plan
from sails_align.experiments.runner import run_jobs
from sails_align.experiments.studies import read_plans

SMALL = ["--n_examples", "16", "--n_prompts", "8", "--n_attacked", "2", "--n_capability", "4"]
SMALL += ["--learning_rates", "1e-3", "1e-2", "--n_seeds", "2", "--progress", "false"]
SMALL += ["--examples", "8", "--n_side_seeds", "1", "--n_extensions", "0"]
RUN_NAMES = ["--runs", "base", "sft-lora", "sft-sails", "dpo-full"]


def options(folder: Path, *more: str) -> list[str]:
    return [*RUN_NAMES, *SMALL, "--output_dir", str(folder), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that was killed once."""
    folder = tmp_path_factory.mktemp("comparison") / "run"
    command = [sys.executable, str(RECIPES / "compare.py"), *options(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    end = time.monotonic() + PATIENCE
    while len(list((folder / "cells").glob("*.json"))) < 3:
        assert time.monotonic() < end
        assert process.poll() is None, process.stderr.read().decode()  # pyright: ignore[reportOptionalMemberAccess]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "SFT-SAILS" in done.stdout
    assert "report.html" in done.stdout
    for name, written in before.items():
        assert (folder / "cells" / name).stat().st_mtime_ns == written  # and not computed again
    return folder


def main_plan(folder: Path) -> Plan:
    ((_, plan),) = read_plan(folder / "plan.json")[0][0].plans
    return plan


@pytest.mark.slow
def test_every_number_of_the_report_comes_from_a_cell(finished: Path) -> None:
    studies, command = read_plan(finished / "plan.json")
    assert [study.kind for study in studies] == ["main", "examples"]
    plan = main_plan(finished)
    assert command.startswith("sails compare --runs base")
    values = json.loads((finished / "results.json").read_text())
    tuned = Results(finished).all(plan.tuning_cells())
    assert len(tuned) == 3 * 2
    chosen = plan.choose(tuned)
    assert values["chosen"] == chosen
    cells = plan.test_cells(chosen)
    assert len(cells) == 1 + 3 * 2
    found = Results(finished).all(cells)
    assert len(found) == len(cells)
    for row in values["rows"]:
        own = [found[cell.key] for cell in cells if cell.run.name == row["run"]]
        for name in ("safety_rate_out_of_distribution", "correct_answer_rate"):
            mean = sum(result["numbers"][name]["value"] for result in own) / len(own)
            assert row["means"][name]["value"] == pytest.approx(mean)
        assert all(result["attack"]["attack_success_rate"]["n"] == 2 for result in own)
        assert all(set(result["capability"]) >= {"testbed_answers", "testbed_facts"} for result in own)
    rows = {row["run"]: row for row in values["rows"]}
    assert rows["base"]["means"]["safety_rate_in_distribution"]["value"] == 0.0
    assert rows["base"]["means"]["correct_answer_rate"]["value"] > 0.9
    assert rows["sft-sails"]["means"]["trainable_share"]["value"] == pytest.approx(0.0336, abs=1e-3)
    assert rows["dpo-full"]["means"]["trainable_share"]["value"] == 1.0
    (rows_of_8,) = values["studies"]["examples"].values()
    assert {row["run"] for row in rows_of_8} == {"sft-lora", "sft-sails", "sft-full"}
    for page in ("report.html", "report.md"):
        text = (finished / page).read_text()
        assert all(sentence in html.unescape(text) for sentence in values["findings"])
        for title in (
            "Findings",
            "Minus",
            "Safety against helpfulness",
            "By category",
            "What the features mean",
            "What it cost",
        ):
            assert title in text
        assert "How many examples it takes" in text
        for row in values["rows"]:
            assert f"{100 * row['means']['correct_answer_rate']['value']:.1f}" in text
        assert "sails compare --runs base" in text


@pytest.mark.slow
def test_a_grid_is_extended_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    computed: list[str] = []

    def compute(cells: Sequence[Cell], results: Results, *_: Any) -> None:
        """Write results in place of trainings: full DPO is the better, the higher its rate, but one seed is broken."""
        for cell in cells:
            if not results.path(cell).is_file():
                computed.append(cell.name)
                broken = (cell.run.name, cell.seed) == ("dpo-full", 1)
                safety = 0.5 + (cell.learning_rate or 0) * (1 if cell.run.name == "dpo-full" else -1)
                write_json(results.path(cell), {"cell": {}, **result(safety, 0.0 if broken else 0.9)})

    monkeypatch.setattr(comparing, "_compute", compute)
    argv = [
        "--runs",
        "dpo-full",
        "sft-full",
        "--n_seeds",
        "3",
        "--learning_rates",
        "1e-3",
        "3e-3",
        "1e-2",
        "--progress",
    ]
    values = comparing.main([*argv, "false", "--output_dir", str(tmp_path / "run")])
    rates = [name.split("/")[2] for name in computed if name.startswith("validation/dpo-full")]
    assert rates == ["0.001", "0.003", "0.01", "0.03", "0.1"]
    assert not any(name.startswith("validation/sft-full/0.1") for name in computed)
    rows = {row["run"]: row for row in values["rows"]}
    assert values["chosen"] == {"dpo-full": 0.1, "sft-full": 1e-4}
    assert rows["dpo-full"]["tuning"]["grid"] == [1e-3, 3e-3, 1e-2, 3e-2, 0.1]
    assert rows["dpo-full"]["tuning"]["is_at_end"]
    assert [unstable["seed"] for unstable in rows["dpo-full"]["unstable_seeds"]] == [1]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| DPO-full (unstable) |" in report
    for text in (capsys.readouterr().out, report):
        assert "its learning rate 0.1 is at the end of the grid" in text
        assert "seed 1 has correct answers (%) 0.0 (median 90.0)" in text
    n_computed = len(computed)
    again = comparing.main([*argv, "false", "--output_dir", str(tmp_path / "run")])
    assert (again["rows"], len(computed)) == (values["rows"], n_computed)
    assert comparing.report_main(["--output_dir", str(tmp_path / "run")])["rows"] == values["rows"]
    capsys.readouterr()
    comparing.main([*argv, "false", "--output_dir", str(tmp_path / "run"), "--list_cells", "true"])
    assert "validation/dpo-full/0.1/1000" in capsys.readouterr().out.split()


@pytest.mark.slow
def test_a_cell_is_what_the_recipe_makes(finished: Path, tmp_path: Path) -> None:
    from sails_align.training import run as align

    plan = main_plan(finished)
    cell = next(cell for cell in plan.tuning_cells() if cell.run.name == "sft-lora")
    (result,) = Results(finished).all([cell]).values()
    argv = ["--init", "default", "--learning_rate", str(cell.learning_rate), "--seed", str(cell.seed)]
    argv += ["--max_train_examples", "16", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "run")]
    align.main("sft", argv)
    command = [sys.executable, str(ROOT / "eval" / "safety.py"), "--model", str(tmp_path / "run"), "--n_prompts", "8"]
    command += ["--part", "validation", "--cache_path", str(tmp_path / "cache.sqlite"), "--output_dir"]
    subprocess.run([*command, str(tmp_path / "safety")], check=True, capture_output=True, timeout=PATIENCE)
    overall = json.loads((tmp_path / "safety" / "metrics.json").read_text())["overall"]
    for name in ("safety_rate", "harmfulness", "over_refusal_rate", "correct_answer_rate"):
        assert result["numbers"][name]["value"] == pytest.approx(overall[name]["value"]), name


@pytest.mark.slow
def test_the_report_can_be_made_again_and_is_the_same(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "report.md").unlink()
    again = comparing.report_main(["--output_dir", str(copy)])
    assert again["rows"] == json.loads((finished / "results.json").read_text())["rows"]
    drawn = "figures/trade_off_sft.svg"
    assert (copy / drawn).read_bytes() == (finished / drawn).read_bytes()
    lost = next((copy / "cells").glob("sft-sails-*.json"))
    lost.unlink()
    with pytest.raises(InputError, match=r"1 of .* results are missing, such as of (\w+/)+sft-sails/"):
        comparing.report_main(["--output_dir", str(copy)])
    lost.write_text("{")
    with pytest.raises(InputError, match="is no result of a cell"):
        comparing.report_main(["--output_dir", str(copy)])


@pytest.mark.slow
def test_the_page_is_one_file_without_network(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    assert not re.search(r"""(?:src|href|srcset)=["'](?!data:|#)""", text)
    assert not re.search("https?:", re.sub(r"data:[^\"]*", "", text))
    assert "<script" not in text


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [400, 1100])
def test_the_page_in_a_browser(finished: Path, tmp_path: Path, width: int) -> None:
    """Drawn by Chromium without a message on its console, and no wider than the window."""
    browser = Browser(tmp_path)
    try:
        browser.open(finished / "report.html", width)
        assert browser.value("document.documentElement.scrollWidth") <= max(width, 500)
        assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth)")
        assert not browser.messages
    finally:
        browser.close()


@pytest.mark.slow
def test_a_cell_that_fails_leaves_the_others_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Run("wrong", "wrong", "sft", ("--init", "nonsense"))
    measures = Measures(n_examples=16, n_prompts=4, n_attacked=0, n_capability=0)
    plan = Plan(runs=(RUNS["base"], wrong), n_seeds=1, learning_rates=(1e-3,), measures=measures)
    results = Results(tmp_path)
    failures = run_jobs(results.jobs(plan.tuning_cells()), Local(2))
    assert [failure.job.name for failure in failures] == ["wrong, seed 1000, learning rate 0.001"]
    assert "nonsense" in str(failures[0])
    cells = [cell for cell in plan.test_cells({"wrong": 1e-3}) if cell.run.name == "base"]
    assert run_jobs(results.jobs(cells), Local(2)) == []
    assert results.all(cells[:1])
    with pytest.raises(SystemExit) as ended:
        comparing._compute(plan.tuning_cells(), results, "", Local(2), progress=False)
    assert ended.value.code == 1
    assert "1 trainings failed" in capsys.readouterr().err


def test_a_pattern_of_cells_also_means_those_that_results_call_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The highest learning rate is the best one, so a higher one is tried, and once more."""
    turns: list[list[float | None]] = []

    def compute(cells: Sequence[Cell], results: Results, *_: Any) -> None:
        turns.append([cell.learning_rate for cell in cells])
        for cell in cells:
            made = result((cell.learning_rate or 0) ** 0.5, cell=cell.to_json())
            write_json(results.path(cell), made)

    monkeypatch.setattr(comparing, "_compute", compute)
    argv = ["--runs", "sft-lora", "--learning_rates", "1e-4", "1e-3", "--output_dir", str(tmp_path / "run")]
    comparing.main([*argv, "--cell", "validation/*"])
    assert [len(rates) for rates in turns] == [2, 3, 4]
    comparing.main([*argv, "--cell", "validation/sft-lora/0.001/1000"])
    assert turns[3:] == [[0.001]]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--runs", "nonsense"], "there is no run 'nonsense'"),
        (["--world", "google/gemma-2-2b"], "world is 'google/gemma-2-2b'"),
        (["--n_seeds", "0"], "n_seeds is 0"),
        (["--learning_rates", "7"], "learning rates are"),
        (["--processes", "0"], "processes is 0"),
        (["--seeds", "3"], "unknown option '--seeds'"),
        (["--worlds", "gpt2"], "worlds has 'gpt2'; give testbed"),
        (["--worlds", "contamination=2"], "contamination a share"),
        (["--cell", "test/sft-lora/7"], "there is no cell 'test/sft-lora/7'; did you mean"),
        (["--worlds", "testbed:1", "testbed:1"], "worlds names one twice"),
        (["--examples", "0"], "examples are"),
    ],
)
def test_what_cannot_be_used(argv: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        comparing.main([*argv, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a comparison's plan"):
        comparing.report_main(["--output_dir", str(tmp_path)])


@pytest.mark.parametrize("study", ["methods", "tampering"])
def test_studies_with_a_bench_of_their_own_can_be_started_on_a_model(study: str, tmp_path: Path) -> None:
    """Their options have places that are filled in for each cell, so they are no recipe's that could be read before."""
    argv = ["--config", str(RECIPES / "configs/smollm2-135m/compare.yaml"), "--study", study]
    _, launching, (planned,) = read_plans(CommandLine.read([*argv, "--output_dir", str(tmp_path)]), None)
    cells = [cell for _, plan in planned.plans for cell in plan.test_cells({})]
    assert cells
    assert all(cell.run.has_bench for cell in cells)
    comparing._prepare(cells, launching)  # which raises for what cannot be started


def test_the_command_in_a_report_has_what_changes_results() -> None:
    given = "--study methods --n_seeds 2 --output_dir runs/x"
    how = "--processes 1 --no_progress --overwrite_output_dir true --launcher slurm --slurm_gpus 2 --report_to wandb"
    line = CommandLine.read([*given.split(), *how.split(), "--cell", "validation/*"])
    assert comparing._command(line) == f"sails compare {given}"
