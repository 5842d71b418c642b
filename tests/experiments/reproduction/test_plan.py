"""The plan of a reproduction is what docs/reproduction.md says: its commands for each model, and what they cost."""

import re
import shlex
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from documented import blocks
from hub_configs import CONFIGS, parse
from paths import ROOT

from sails_align.cli.reproduce import planned as planned_by
from sails_align.core.command_line import CommandLine
from sails_align.experiments.commands import check
from sails_align.experiments.jobs import Job
from sails_align.experiments.options import ReproduceOptions
from sails_align.experiments.reproduction.checks import repositories
from sails_align.experiments.reproduction.costs import costs_of
from sails_align.experiments.reproduction.plan import Reproduction, fitting_engine
from sails_align.experiments.reproduction.results import table
from sails_align.experiments.studies import read_plans
from sails_align.training.plan import changed

DOCUMENT = "docs/reproduction.md"
RUNS = ("sft-lora", "sft-sails", "sft-full", "dpo-lora", "dpo-sails", "dpo-full")
STAGES = {"discover": "discovery", "train/sft": "SFT", "train/dpo": "DPO", "evaluate": "evaluation", "attack": "GCG"}


@pytest.fixture(autouse=True)
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def planned(model: str, num_gpus: int = 8, gpu_memory_gib: float = 80.0) -> Reproduction:
    line = CommandLine.read(["--config", f"recipes/configs/{model}/compare.yaml"])
    plan = read_plans(line, None)[2][0].plans[0][1]
    assert plan.protocol is not None
    folder, config = Path("runs") / f"reproduce-{model}", parse(CONFIGS[model])
    of = Reproduction(plan.runs, plan.protocol, folder, num_gpus, gpu_memory_gib, config)
    assert all(fit.is_enough for fit in of.fits.values())
    return of


def values() -> list[dict[str, str]]:
    """Of the table: what the variables are for each model."""
    rows = re.findall(r"^\| (\S+) \| (\S+/\S+) \| (\S+/\S+) \|$", (ROOT / DOCUMENT).read_text(), re.MULTILINE)
    return [
        {"MODEL": model, "BASE": base, "RLHF": rlhf, "RUNS": f"runs/reproduce-{model}"} for model, base, rlhf in rows
    ]


def test_models_of_the_same_name_are_downloaded_both() -> None:
    plan = planned("gemma-2-9b")
    base = next(run for run in plan.runs if run.trainer == "none")
    other = replace(base, name="other", options=(base.options[0], f"other/{plan.model.rpartition('/')[2]}"))
    jobs = replace(plan, runs=(*plan.runs, other)).jobs()
    names = [job.name for job in jobs if job.name.startswith("data/")]
    assert len(set(names)) == len(names)
    assert {f"data/{plan.model.replace('/', '--')}", "data/other--gemma-2-9b"} <= set(names)
    assert len(costs_of(jobs, replace(plan, runs=(*plan.runs, other)), 100.0)) == len(jobs)


def documented(of: dict[str, str]) -> list[tuple[str, ...]]:
    """The commands of the section, for a model; those of a run for each run."""
    found = []
    for block in blocks(DOCUMENT):
        for command in block.commands:
            if command.startswith(("export", "python")):
                continue
            for run in RUNS if "$RUN/" in command or command.endswith("$RUN") or "$RUN " in command else ("",):
                text = re.sub(r"\$(\w+)", lambda match, run=run: {**of, "RUN": run}[match[1]], command)
                found.append(tuple(shlex.split(text)))
    return found


def test_the_table_has_all_models() -> None:
    assert [of["MODEL"] for of in values()] == ["gemma-2-2b", "gemma-2-9b", "llama-3.1-8b", "gemma-3-4b"]


@pytest.mark.parametrize("of", values(), ids=lambda of: of["MODEL"])
def test_documented_commands_are_those_of_the_plan(of: dict[str, str]) -> None:
    jobs = planned(of["MODEL"]).jobs()
    told = {job.work for job in jobs if job.name.split("/")[1] not in ("base", "rlhf")}
    assert set(documented(of)) == told
    assert {job.name for job in jobs if job.work not in told} == {
        *(f"evaluate/{run}/{kind}" for run in ("base", "rlhf") for kind in ("safety", "helpfulness", "harness")),
        "attack/rlhf/gcg",
    }
    by_name = {job.name: argv_of(job) for job in jobs}
    for kind in ("safety", "helpfulness"):
        assert "--chat_template_path" in by_name[f"evaluate/base/{kind}"]
        assert "--chat_template_path" not in by_name[f"evaluate/rlhf/{kind}"]
    assert by_name["evaluate/base/safety"][4] == of["BASE"]
    assert by_name["attack/rlhf/gcg"][4] == of["RLHF"]


@pytest.mark.parametrize("model", CONFIGS)
def test_all_commands_can_be_read(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # vLLM is in an environment of its own
    of = planned(model)
    check(of.runs, of.protocol)


def by_stage(model: str) -> dict[str, float]:
    of = planned(model)
    jobs = of.jobs()
    found: dict[str, float] = defaultdict(float)
    for job, costs in zip(jobs, costs_of(jobs, of, 300.0), strict=True):
        stage = next((label for prefix, label in STAGES.items() if job.name.startswith(prefix)), "data")
        found[stage] += costs.gpu_hours
        found["all"] += costs.gpu_hours
        found["disk"] += costs.disk_gb
        found["requests"] += costs.judge_requests
    return found


@pytest.mark.parametrize("model", CONFIGS)
def test_documented_costs_are_computed(model: str) -> None:
    of = by_stage(model)
    hours = [f"{of[label]:.1f}" if of[label] >= 0.05 else f"{of[label]:.2f}" for label in (*STAGES.values(), "all")]
    row = f"| {model} | {' | '.join(hours)} | {of['disk']:,.0f} | {of['requests']:,.0f} |"
    assert row in (ROOT / DOCUMENT).read_text(), row


def test_costs_by_hand() -> None:
    """Of SFT with an adapter and gradient checkpointing: 6 operations a parameter and token."""
    of = planned("gemma-2-2b")
    (costs,) = costs_of([of_run(of, "train/sft-sails")], of, 300.0)
    tokens = 2 * 42_537 * 654 / 4
    assert costs.gpu_hours == pytest.approx(6 * 2_614_341_888 * tokens / 300e12 / 3600)
    assert costs_of([of_run(of, "discover/sails")], of, 300.0)[0].disk_gb == pytest.approx(
        4 * 2 * 16384 * 2304 * 4 / 1e9
    )


@pytest.mark.slow
def test_the_size_of_a_model_whose_first_training_is_of_all_weights() -> None:
    """Of a multimodal one these are the language model's, and the frozen rest is a part of it all the same."""
    of = planned("gemma-3-4b")
    full_first = replace(of, runs=tuple(sorted(of.runs, key=lambda run: run.name != "sft-full")))
    assert [_gpu_hours(of, name) for name in RUNS] == [_gpu_hours(full_first, name) for name in RUNS]


def _gpu_hours(of: Reproduction, run: str) -> float:
    return costs_of([of_run(of, f"train/{run}")], of, 300.0)[0].gpu_hours


def test_engines_of_a_quantized_base() -> None:
    of, config = planned("gemma-2-9b"), parse(CONFIGS["gemma-2-9b"])
    args = of.arguments["sft-sails"]
    args = replace(args, model=changed(args.model, load_in_4bit=True))
    small, large = fitting_engine(args, config, 8, 1.0), fitting_engine(args, config, 1, 80.0)
    assert (small.engine, small.is_enough) == ("ddp", False)  # DeepSpeed would be refused
    assert (large.engine, large.is_enough) == ("single", True)


def test_the_paper_s_numbers_are_in_the_table(tmp_path: Path) -> None:
    of = replace(planned("gemma-2-9b"), output_dir=tmp_path)
    rows = table(of).splitlines()
    assert [re.findall(r"\[(.*?)\]", row) for row in rows if "[" in row] == [["99.6"], ["92.2"]]


def of_run(of: Reproduction, name: str) -> Job:
    return next(job for job in of.jobs() if job.name == name)


def argv_of(job: Job) -> tuple[str, ...]:
    assert isinstance(job.work, tuple)
    return job.work


def test_other_machines() -> None:
    one = planned("gemma-2-2b", num_gpus=1)
    argv = argv_of(of_run(one, "train/dpo-sails"))
    assert "accelerate_configs/single_gpu.yaml" in argv
    assert argv[argv.index("--gradient_accumulation_steps") + 1] == "32"  # of batches of 2: 64 pairs, as on 8 GPUs
    full = planned("gemma-2-9b", num_gpus=1)
    assert "accelerate_configs/zero3_offload.yaml" in argv_of(of_run(full, "train/sft-full"))
    small = planned("gemma-2-9b", gpu_memory_gib=40.0)
    assert "accelerate_configs/zero3.yaml" in argv_of(of_run(small, "train/sft-full"))
    args, config = small.arguments["sft-full"], parse(CONFIGS["gemma-2-9b"])
    assert not fitting_engine(args, config, 1, 8.0).is_enough


def test_what_the_attacks_need_is_looked_at_if_there_are_some() -> None:
    of, needed = planned("gemma-2-9b"), ("dataset", "walledai/AdvBench")
    assert needed in repositories(of)
    assert needed not in repositories(replace(of, only=("train", "evaluate")))


def test_memory_is_that_of_the_wanted_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sails_align.training.dataset.load_model_config", lambda *_: parse(CONFIGS["gemma-2-9b"]))
    everything, _ = planned_by(ReproduceOptions("gemma-2-9b", num_gpus=1))
    adapter, _ = planned_by(ReproduceOptions("gemma-2-9b", num_gpus=1, steps=["train/sft-sails"]))
    assert [job.name for job in adapter.jobs()] == ["train/sft-sails"]
    assert adapter.memory_gib < 60 < 150 < everything.memory_gib


def test_steps_wait_for_what_they_start_from() -> None:
    jobs = {job.name: job for job in planned("gemma-2-9b").jobs()}
    assert "discover/sails" in jobs["train/sft-sails"].after
    assert "discover/sails" not in jobs["train/sft-lora"].after
    assert jobs["evaluate/sft-sails/safety"].after[-1] == "train/sft-sails"
    names = list(jobs)
    for place, job in enumerate(jobs.values()):
        assert all(names.index(name) < place for name in job.after if name in jobs)
    outdated = {path.stem for path in jobs["discover/sails"].outdates}
    assert {"train.sft-sails", "evaluate.dpo-sails.harness", "attack.sft-sails.gcg"} <= outdated
    assert not any("lora" in name for name in outdated)


def test_what_a_new_training_outdates(tmp_path: Path) -> None:
    """Also evaluations that the file leaves out now: if it names them again, they must not count as done."""
    of = replace(planned("gemma-2-9b"), output_dir=tmp_path)
    kept = tuple(entry for entry in of.protocol.evaluate if entry[1] != "harness")
    without = replace(of, protocol=replace(of.protocol, evaluate=kept))
    for each in (of, without):
        outdated = {path.stem for path in of_run(each, "train/sft-sails").outdates}
        kinds = ("safety", "helpfulness", "divergence", "harness")
        assert outdated == {"attack.sft-sails.gcg", *(f"evaluate.sft-sails.{kind}" for kind in kinds)}
        found = {path.stem for path in of_run(each, "discover/sails").outdates}
        assert outdated | {"train.sft-sails", "train.dpo-sails"} < found
        assert not any("lora" in name for name in found)
    assert of_run(of, "evaluate/sft-sails/safety").outdates == ()


def test_what_counts_as_done(tmp_path: Path) -> None:
    of, config, results = replace(planned("gemma-2-9b"), output_dir=tmp_path), tmp_path / "c.yaml", tmp_path / "results"
    config.write_text("lora_r: 8")
    argv = ("sails", "train", "sft", "--config", str(config), "--output_dir", str(results))
    job = of.job("train/sft-sails", argv, "all")
    assert not job.is_done()
    job.finish(job.record or {})
    assert not job.is_done()  # its results were deleted
    results.mkdir()
    assert job.is_done()
    config.write_text("lora_r: 16")
    assert not of.job("train/sft-sails", argv, "all").is_done()
    config.unlink()
    assert not of.job("train/sft-sails", argv, "all").is_done()
    for damaged in (b"", b"{", b"[1]", b"\xff", b'{"argv": 1}'):
        job.result.write_bytes(damaged)
        assert not job.is_done()
