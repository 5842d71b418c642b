"""Send the responses that a training on the testbed ends with to the trackers of `--report_to`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback

from sails_align.core.trackers import SERVICES, trackers_of
from sails_align.training.trainer import AlignmentTrainer

COLUMNS = ("split", "category", "prompt", "response", "score", "refused", "correct")


def send_responses(trainer: AlignmentTrainer, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add a table of the responses of each model to the runs that transformers' callbacks log to, and end these runs.

    Args:
        trainer: with its callbacks.
        rows: of `responses.jsonl`.
    """
    args = trainer.args
    services = [name for name in args.report_to or () if name in SERVICES]
    if not rows or not services:
        return
    callbacks = trainer.callback_handler.callbacks
    folder = next((str(of.logging_dir) for of in callbacks if isinstance(of, TensorBoardCallback)), "")
    with trackers_of(services, str(args.run_name), Path(folder), args.project, go_on=True) as trackers:
        for model in dict.fromkeys(row["model"] for row in rows):
            of_model = [{name: row[name] for name in COLUMNS} for row in rows if row["model"] == model]
            trackers.table(f"responses/{model}", of_model)
