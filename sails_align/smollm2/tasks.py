"""A task for lm-eval-harness of plain common knowledge, to measure what training for safety costs of it.

common_knowledge   120 questions with four answers each; the right one is to be likeliest
"""

import csv
import random
from pathlib import Path

from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.harness.tasks import shuffled, write_task
from sails_align.models.spec import ModelSpec
from sails_align.smollm2.requests import DATA

TASK = "common_knowledge"
CHANCE = 0.25


def make_tasks(args: HarnessArguments, spec: ModelSpec, folder: Path) -> None:
    """Write the task if it is asked for (`evaluation.harness.TASK_MAKERS`)."""
    if TASK not in args.tasks:
        return
    rng = random.Random(TASK)
    with (DATA / f"{TASK}.csv").open(encoding="utf-8", newline="") as file:
        rows = [shuffled(question, choices, rng) for question, *choices in list(csv.reader(file))[1:]]
    write_task(TASK, rows, folder, chance=CHANCE)
