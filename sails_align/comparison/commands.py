"""A cell of models that are no testbed: the commands that a user would give, each in a process of its own, one after
another, and what they measured.

<folder>/train/                the recipe's run: the model
<folder>/<cell>/safety/ ...    the evaluations
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sails_align import align
from sails_align.artifacts import package_versions
from sails_align.comparison.plan import Cell, Kind, Protocol, Run
from sails_align.cost import Cost
from sails_align.errors import InputError
from sails_align.eval_harness import HarnessArguments
from sails_align.eval_helpfulness import ReferenceArguments
from sails_align.eval_judges import JudgeArguments
from sails_align.eval_options import PromptArguments, ResponseArguments, RunArguments
from sails_align.explaining import FILE
from sails_align.subspace.basis import Subspace
from sails_align.testbed.build import is_testbed
from sails_align.testbed.evaluate import HARMFUL, HARMLESS
from sails_align.training.parsing import CommandLine

DONE = "metrics.json"
"""Is written last by trainings and evaluations, so that one that was cut off is given again and goes on."""
SAILS = ("-m", "sails_align")
_JUDGED = (ResponseArguments, PromptArguments, JudgeArguments, RunArguments)
OPTIONS: dict[Kind, tuple[type, ...]] = {
    "safety": _JUDGED,
    "helpfulness": (*_JUDGED, ReferenceArguments),
    "harness": (HarnessArguments,),
}
"""What evaluations can be told."""


def check(runs: Sequence[Run], protocol: Protocol) -> None:
    """Read the options of all commands, before any of them is given.

    Raises:
        InputError: if a command would not take them.
    """
    for run in runs:
        if run.trainer in ("sft", "dpo"):
            try:
                align.parse(run.trainer, list(run.options))
            except InputError as error:
                raise InputError(f"the run {run.name} cannot be trained: {error}") from error
        else:
            _read_options("safety", run.options, f"the run {run.name} cannot be evaluated")
    for part, kind, options in protocol.evaluate:
        read = _read_options(kind, options, f"evaluate: {part}: {kind} cannot be given")
        if kind == "safety" and part == "test":
            _check_sets(protocol, read[1])


def _check_sets(protocol: Protocol, asked: PromptArguments) -> None:
    """Refuse names of prompt sets that there will be no rates of; files can name parts of their own."""
    known = {*asked.prompts, *((*HARMFUL, *HARMLESS) if any(map(is_testbed, asked.prompts)) else ())}
    has_files = any(Path(name.rpartition("=")[2]).exists() for name in asked.prompts)
    for name in (protocol.in_distribution, protocol.out_of_distribution):
        if name is not None and name not in known and not has_files:
            raise InputError(
                f"in_distribution or out_of_distribution is {name!r}, which is none of the prompt sets of `safety`; "
                f"choose among {', '.join(sorted(known))}"
            )


def _read_options(kind: Kind, options: Sequence[str], failure: str) -> tuple[Any, ...]:
    try:
        return CommandLine.read(options).parse(OPTIONS[kind])
    except InputError as error:
        raise InputError(f"{failure}: {error}") from error


def run_commands(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train and evaluate, in a folder that outlives the cell. The result is JSON-able.

    Models of the validation part are deleted once they are measured; those of the test part stay.

    Raises:
        InputError: if a command fails. What it printed is on standard output and standard error.
    """
    protocol = cell.protocol
    assert protocol is not None
    if cell.run.trainer == "none":
        _, model, *how = cell.run.options
    else:
        model, how = str(folder / "train"), []
        _give([*training(cell, protocol), "--output_dir", model], folder / "train" / DONE)
    evaluated, cost = folder / cell.key, Cost()
    for kind, options in protocol.of_part(cell.part).items():
        command = [
            sys.executable,
            *SAILS,
            "eval",
            kind,
            "--model",
            model,
            *options,
            *([] if kind == "harness" else how),
        ]
        with cost.of(kind):
            _give([*command, "--output_dir", str(evaluated / kind)], evaluated / kind / DONE)
    if cell.part == "test" and _has_features(folder / "train"):
        with cost.of("explain"):
            _give([sys.executable, *SAILS, "features", "--run", model], folder / "train" / FILE)
    found = gathered(cell, protocol, folder)
    found["cost"]["seconds"] = {**found["cost"]["seconds"], **cost.seconds}
    if cell.part == "validation":
        shutil.rmtree(folder / "train", ignore_errors=True)
    return found


def training(cell: Cell, protocol: Protocol) -> list[str]:
    """The command that trains a cell's model, but for its `--output_dir`."""
    options = [*cell.run.options, "--seed", str(cell.seed)]
    if cell.learning_rate is not None:
        options += ["--learning_rate", str(cell.learning_rate)]
    if cell.measures.n_examples is not None:
        options += ["--max_train_examples", str(cell.measures.n_examples)]
    if cell.measures.contamination:
        options += ["--contamination", str(cell.measures.contamination)]
    launch = ["-m", "accelerate.commands.launch", *protocol.launch] if protocol.launch else []
    return [sys.executable, *launch, *SAILS, "train", cell.run.trainer, *options]


def _give(command: list[str], done: Path) -> None:
    """Give a command, unless the file is there that it writes last."""
    if done.is_file():
        return
    print("$", *command, flush=True)
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise InputError(f"{' '.join(command)}\nended with exit code {code}; what it printed is above")


def _has_features(run: Path) -> bool:
    """Whether a run started in a subspace of SAE features."""
    return (run / "subspace").is_dir() and "features" in Subspace.load(run / "subspace").provenance


def gathered(cell: Cell, protocol: Protocol, folder: Path) -> dict[str, Any]:
    """What the commands of a cell measured, in the form of the testbed's cells."""
    evaluated = folder / cell.key
    measured = {kind: _read(evaluated / kind / DONE) for kind in protocol.of_part(cell.part)}
    safety = measured["safety"]
    numbers = dict(safety["overall"])
    attack = {name: numbers.pop(name) for name in list(numbers) if name.startswith("attack_success_rate")}
    splits = (
        ("safety_rate_in_distribution", protocol.in_distribution),
        ("safety_rate_out_of_distribution", protocol.out_of_distribution),
    )
    for name, split in splits:
        if split is not None and cell.part == "test":
            numbers[name] = _of_split(safety, split)
    if "helpfulness" in measured:
        numbers |= measured["helpfulness"]["overall"]
    cost: dict[str, Any] = {"seconds": {}, "trainable_parameters": 0, "trainable_share": 0.0}
    if cell.run.trainer != "none":
        cost = _read(folder / "train" / DONE)["cost"]
    found = {
        "cell": {"run": cell.run.name, "seed": cell.seed, "part": cell.part, "learning_rate": cell.learning_rate},
        "numbers": numbers,
        "by_category": by_category(safety, evaluated / "safety" / "responses.jsonl", protocol.out_of_distribution),
        "cost": {"steps_to_95": None, "peak_memory_mb": None, **cost},
        "versions": package_versions(),
    }
    if attack:
        found["attack"] = attack
    if (folder / "train" / FILE).is_file():
        found["features"] = _read(folder / "train" / FILE)
    if "harness" in measured:
        found["capability"] = capability(measured["harness"])
    return found


def _of_split(safety: Mapping[str, Any], split: str) -> Mapping[str, Any]:
    """The safety rate on one prompt set.

    Raises:
        InputError: if there is no such set, or it has no harmful prompts.
    """
    of = safety["by_split"]
    if "safety_rate" not in of.get(split, {}):
        harmful = [name for name, rates in of.items() if "safety_rate" in rates]
        raise InputError(
            f"{split!r} is none of the sets with harmful prompts; choose among {', '.join(harmful) or 'others'}"
        )
    return of[split]["safety_rate"]


def by_category(safety: Mapping[str, Any], responses: Path, out_of_distribution: str | None) -> dict[str, Any]:
    """Safety rate of each harm category, over-refusal of each harmless one, as cells of the testbed have them."""
    found: dict[str, Any] = {}
    with responses.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        harmful = row["kind"] == "harmful"
        name = row["category"] if harmful else f"{row['category']} ({row['kind']})"
        rates = safety["by_category"].get(name, {})
        rate = rates.get("safety_rate" if harmful else "over_refusal_rate")
        if name not in found and rate is not None:
            is_new = row["meta"].get("split") == out_of_distribution
            found[name] = {"split": ("ood" if is_new else "harmful") if harmful else "harmless", **rate}
    return dict(sorted(found.items()))


def capability(harness: Mapping[str, Any]) -> dict[str, float]:
    """Each task's first score of which more is better."""
    found = {}
    for task, scores in harness["tasks"].items():
        values = [
            of["model"]["value"]
            for of in scores.values()
            if of["model"]["higher_is_better"] is not False and of["model"]["value"] is not None
        ]
        if values:
            found[task] = float(values[0])
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete its folder to compute it again") from error
