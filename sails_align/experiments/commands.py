"""Compute a cell of a model other than the testbed: run the commands that a user would, and gather the results.

<folder>/train/                the recipe's run: the model
<folder>/<cell>/safety/ ...    the evaluations
"""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import package_versions
from sails_align.core.command_line import CommandLine
from sails_align.core.cost import Cost
from sails_align.core.errors import InputError
from sails_align.core.suggestions import did_you_mean
from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.metrics import safety_rate_of
from sails_align.evaluation.options import (
    DivergenceArguments,
    PromptArguments,
    ReferenceArguments,
    ResponseArguments,
    RunArguments,
)
from sails_align.evaluation.output import METRICS_FILE
from sails_align.evaluation.prompts import maker_of
from sails_align.evaluation.prompts.load import split_of
from sails_align.experiments.plan import Cell, Evaluation, Protocol, Run, option_groups, option_words
from sails_align.steering.options import SteeringOptions
from sails_align.subspace.basis import Subspace
from sails_align.testbed.build import is_testbed
from sails_align.training import run as align
from sails_align.training.features import FEATURES_FILE

logger = logging.getLogger(__name__)

DONE = "done"
"""File in the folder of a command that succeeded. Without it the command is run again, and resumes."""
AGAIN = ("--retry_unscored", "true")
"""Option of evaluations: when started again, only ask for what failed."""
REPLACING = ("--overwrite_output_dir", "true")
"""Option of commands whose folder is the cell's or the step's own: what an earlier model left there is out of date."""
PACKAGES = {"vllm": "vllm", "harness": "lm_eval"}
"""Packages that a backend or an evaluation needs."""
SAILS = ("-m", "sails_align")
JUDGED = ("safety", "helpfulness")
_JUDGED = (ResponseArguments, PromptArguments, JudgeArguments, RunArguments)
OPTIONS: dict[Evaluation, tuple[type, ...]] = {
    "safety": (*_JUDGED, SteeringOptions),
    "helpfulness": (*_JUDGED, ReferenceArguments, SteeringOptions),
    "divergence": (ResponseArguments, PromptArguments, RunArguments, DivergenceArguments),
    "harness": (HarnessArguments,),
}
"""Options of the evaluations."""


def check(runs: Sequence[Run], protocol: Protocol) -> None:
    """Read the options of all commands before any is run.

    Raises `InputError` if a command would refuse them, or a package that it needs is not installed.
    """
    for run in runs:
        if run.trainer in ("sft", "dpo"):
            try:
                align.parse(run.trainer, list(run.options))
            except InputError as error:
                raise InputError(f"the run {run.name} cannot be trained: {error}") from error
    models = [run for run in runs if run.trainer == "none"]
    for run in models:
        _read_options("safety", run.options, f"the run {run.name} cannot be evaluated")
    paths = [("launch", path) for path in option_groups(protocol.launch).get("--config_file", ())]
    paths += [(f"the run {run.name}", run.options[1]) for run in models]
    for part, kind, options in protocol.evaluate:
        where = f"evaluate: {part}: {kind}"
        read = _read_options(kind, options, f"{where} cannot be given")
        for needs in (kind, read[0].backend):
            if needs in PACKAGES and importlib.util.find_spec(PACKAGES[needs]) is None:
                raise InputError(f"{where} needs the package {PACKAGES[needs]}; install 'sails-align[{needs}]'")
        if kind in JUDGED and read[2].judge is None and not all(map(is_testbed, read[1].prompts)):
            raise InputError(f"{where} names no judge; add judge: llm or guard, with judge_model")
        if kind == "divergence" and (read[0].backend != "hf" or read[3].base is None):
            raise InputError(f"{where} needs the backend hf, and base: the model that the runs were trained from")
        if kind == "helpfulness" and set(read[2].judge or ()) == {"rouge"} and read[4].reference is None:
            raise InputError(f"{where} has the judge rouge, which needs a reference; add one, such as the base model")
        if kind != "harness":
            paths += [(where, name.rpartition("=")[2]) for name in read[1].prompts]
            paths += [] if read[0].chat_template_path is None else [(where, read[0].chat_template_path)]
        if kind == "safety" and part == "test":
            _check_sets(protocol, read[1])
        for run in models:
            _read_options(kind, [*options, *options_of(kind, run)], f"the run {run.name} cannot be evaluated ({where})")
    _warn_of_shared_prompts(protocol)
    for where, name in paths:
        if name.startswith(("/", "./", "../", "~")) and not Path(name).exists():
            raise InputError(
                f"{where} names {name}, which does not exist; check the path (relative to the working folder)"
            )


def _warn_of_shared_prompts(protocol: Protocol) -> None:
    """Warn of prompts by which learning rates are chosen and that are reported, too."""
    asked: dict[str, set[tuple[str, str]]] = {"validation": set(), "test": set()}
    for part, kind, options in protocol.evaluate:
        if kind != "harness":
            prompts = _read_options(kind, options, f"evaluate: {part}: {kind} cannot be given")[1]
            asked[part] |= {(name, prompts.part if maker_of(name) else "") for name in prompts.prompts}
    if both := sorted(name for name, _ in asked["validation"] & asked["test"]):
        logger.warning(
            "evaluate: validation and test both have the prompts %s: learning rates are chosen by what is reported, "
            "which favors the methods that are tuned; give validation other prompts",
            ", ".join(both),
        )


def _check_sets(protocol: Protocol, asked: PromptArguments) -> None:
    """Refuse unknown names of prompt sets; files can contain sets with names of their own."""
    names = {split_of(name) for name in asked.prompts}
    makers = {name: maker for name in asked.prompts if (maker := maker_of(name)) is not None}
    made = [prompt for name, maker in makers.items() for prompt in maker.load()(name, 1, part="test", seed=0)]
    known = names | {str(prompt.meta["split"]) for prompt in made}
    has_files = any(Path(name).exists() for name in names)
    for name in (protocol.in_distribution, protocol.out_of_distribution):
        if name is not None and name not in known and not has_files:
            raise InputError(
                f"in_distribution or out_of_distribution is {name!r}, which is not a prompt set of `safety`"
                f"{did_you_mean(name, sorted(known))}"
            )


def options_of(kind: Evaluation, run: Run) -> list[str]:
    """Return those of a model's own options that an evaluation has."""
    known = {option.name for options in OPTIONS[kind] for option in fields(options)}
    groups = option_groups(run.options[2:])
    return list(option_words({name: values for name, values in groups.items() if name[2:] in known}))


def evaluation(kind: Evaluation, options: Sequence[str], run: Run, model: str) -> list[str]:
    """Return the words after `sails` that evaluate a run's model, without `--output_dir`."""
    own = options_of(kind, run) if run.trainer == "none" else []
    return ["eval", kind, "--model", model, *options, *own, *([] if kind == "harness" else AGAIN)]


def _read_options(kind: Evaluation, options: Sequence[str], failure: str) -> tuple[Any, ...]:
    try:
        return CommandLine.read(options).parse(OPTIONS[kind])
    except InputError as error:
        raise InputError(f"{failure}: {error}") from error


def run_commands(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train and evaluate in a folder that outlives the cell. Returns a JSON-able result.

    Checkpoints, and models of the validation part, are deleted once they are measured. Raises `InputError` if a command
    fails. Its output is on standard output and standard error.
    """
    protocol, cost = cell.protocol, Cost()
    assert protocol is not None
    train, evaluated = folder / "train", folder / cell.key
    if cell.run.trainer == "none":
        model = cell.run.options[1]
    else:
        model = str(train)
        _run_once([*training(cell, protocol), "--output_dir", model], train / DONE, cost, "training")
    for kind, options in protocol.of_part(cell.part).items():
        command = [*evaluation(kind, options, cell.run, model), *REPLACING, "--output_dir", str(evaluated / kind)]
        _run_once([sys.executable, *SAILS, *command], evaluated / kind / DONE, cost, kind)
    if cell.part == "test" and _has_features(train):
        _run_once([sys.executable, *SAILS, "features", "--run", model], train / FEATURES_FILE, cost, "explain")
    found = gathered(cell, protocol, folder)
    found["cost"]["seconds"] |= {kind: seconds for kind, seconds in cost.seconds.items() if kind != "training"}
    for path in [train] if cell.part == "validation" else train.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    return found


def training(cell: Cell, protocol: Protocol) -> list[str]:
    """Return the command that trains a cell's model, without `--output_dir`."""
    options = [*cell.run.options, "--resume_from_checkpoint", "true", *cell.training_options]
    launch = ["-m", "accelerate.commands.launch", "--quiet", *protocol.launch] if protocol.launch else []
    return [sys.executable, *launch, *SAILS, "train", cell.run.trainer, *options]


def _run_once(command: list[str], done: Path, cost: Cost, stage: str) -> None:
    """Run a command, unless it succeeded before. It ends with this process."""
    if done.is_file():
        return
    print("$", *command, flush=True)
    with cost.of(stage), subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except BaseException:  # this process is to end
            process.terminate()
            raise
    if code != 0:
        raise InputError(f"{' '.join(command)}\nfailed with exit code {code}; its output is above")
    done.touch()


def _has_features(run: Path) -> bool:
    """Return whether a run's SAE features can be explained: it names SAEs and harmless requests."""
    if not (run / "subspace").is_dir() or "features" not in Subspace.load(run / "subspace").provenance:
        return False
    record = read_result(run / "run.json")
    sails = record["options"]["sails"]
    return bool((sails["sae_release"] or sails["sae_path"]) and record["data"]["helpful"]["rows"])


def gathered(cell: Cell, protocol: Protocol, folder: Path) -> dict[str, Any]:
    """Return what the commands of a cell measured, in the form of the testbed's cells."""
    evaluated = folder / cell.key
    measured = {kind: read_result(evaluated / kind / METRICS_FILE) for kind in protocol.of_part(cell.part)}
    safety = measured["safety"]
    numbers = dict(safety["overall"])
    attack = {name: numbers.pop(name) for name in list(numbers) if name.startswith("attack_success_rate")}
    rate = safety_rate_of(numbers) or "safety_rate"
    splits = (
        (f"{rate}_in_distribution", protocol.in_distribution),
        (f"{rate}_out_of_distribution", protocol.out_of_distribution),
    )
    for name, split in splits:
        if split is not None and cell.part == "test":
            numbers[name] = _of_split(safety, split)
    for name in ("helpfulness", "divergence"):
        numbers |= measured[name]["overall"] if name in measured else {}
    cost: dict[str, Any] = {"seconds": {}, "trainable_parameters": 0, "trainable_share": 0.0}
    if cell.run.trainer != "none":
        cost = read_result(folder / "train" / METRICS_FILE)["cost"]
    found = {
        "cell": cell.to_json(),
        "numbers": numbers,
        "by_category": by_category(safety, evaluated / "safety" / "responses.jsonl", protocol),
        "by_set": safety["by_split"],
        "cost": {"steps_to_95": None, "peak_memory_mb": None, **cost},
        "versions": package_versions(),
    }
    if attack:
        found["attack"] = attack
    if (folder / "train" / FEATURES_FILE).is_file():
        found["features"] = read_result(folder / "train" / FEATURES_FILE)
    if "harness" in measured:
        found["capability"] = capability(measured["harness"])
    return found


def _of_split(safety: Mapping[str, Any], split: str) -> Mapping[str, Any]:
    """Return the safety rate (or refusal rate) on one prompt set."""
    of = safety["by_split"]
    name = safety_rate_of(of.get(split, {}))
    if name is None:
        harmful = [name for name, rates in of.items() if safety_rate_of(rates)]
        raise InputError(f"{split!r} is not a set with harmful prompts{did_you_mean(split, harmful)}")
    return of[split][name]


def by_category(safety: Mapping[str, Any], responses: Path, protocol: Protocol) -> dict[str, Any]:
    """Return the safety (or refusal) rate of each harm category, and over-refusal of each harmless one.

    Categories of several prompt sets are left out, and harmful ones of sets that the protocol does not name.
    """
    splits: dict[tuple[str, bool], set[str]] = {}
    with responses.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            harmful = row["kind"] == "harmful"
            name = row["category"] if harmful else f"{row['category']} ({row['kind']})"
            splits.setdefault((name, harmful), set()).add(row["meta"]["split"])
    named = {protocol.in_distribution: "harmful", protocol.out_of_distribution: "ood"}
    found = {}
    for (name, harmful), of in sorted(splits.items()):
        split = "harmless" if not harmful else named.get(*of) if len(of) == 1 else None
        rates = safety["by_category"].get(name, {})
        rate = rates.get(str(safety_rate_of(rates)) if harmful else "over_refusal_rate")
        if split is not None and rate is not None:
            found[name] = {"split": split, **rate}
    return found


def capability(harness: Mapping[str, Any]) -> dict[str, float]:
    """Return the first score of each requested task or group for which more is better."""
    asked, tasks = harness["provenance"]["options"]["tasks"], harness["tasks"]
    found = {}
    for task, scores in ({task: tasks[task] for task in asked if task in tasks} or tasks).items():
        values = [
            of["model"]["value"]
            for of in scores.values()
            if of["model"]["higher_is_better"] is not False and of["model"]["value"] is not None
        ]
        if values:
            found[task] = float(values[0])
    return found


def read_result(path: Path) -> dict[str, Any]:
    """Read what a command measured; raise `InputError` if the file is missing or damaged."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise ValueError("no mapping of names to values")
        return result
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete its folder to measure it again") from error
