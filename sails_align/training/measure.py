"""Measure a model before, while and after it trains, through its trainer."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sails_align.core.artifacts import content_hash
from sails_align.core.distributed import from_main
from sails_align.core.errors import InputError
from sails_align.core.files import read_record, write_json
from sails_align.core.log import is_main
from sails_align.evaluation.evaluate import evaluate_model
from sails_align.evaluation.metrics import as_numbers
from sails_align.testbed import prompts as requests
from sails_align.testbed.build import Testbed
from sails_align.training.callbacks.learning_curve import LearningCurveCallback
from sails_align.training.dataset import TrainingSource
from sails_align.training.options import MeasureOptions
from sails_align.training.plan import TrainingPlan
from sails_align.training.trainer import AlignmentTrainer

N_TOKENS = 32
"""Of responses to `--measure_prompts`: a refusal begins with itself."""
LOGGED = "eval_"
"""How the names of measurements begin in logs. Trackers show such names as one group."""


class MeasureStart(TrainerCallback):
    """Measure the model that training starts from when training begins: before, DeepSpeed has no engine to run it.

    `base.json` keeps the result for when the run is resumed.
    """

    base: dict[str, Any] | None = None
    """Numbers; None if the run was resumed from a checkpoint of another folder."""
    responses: list[dict[str, Any]]

    def __init__(
        self,
        measure: Callable[[], tuple[dict[str, Any], list[dict[str, Any]]]],
        output_dir: Path,
        identity: dict[str, Any],
    ) -> None:
        self._measure, self._path = measure, output_dir / "base.json"
        self._identity, self.responses = content_hash(identity), []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, or when resuming read the result."""
        if state.global_step > 0:
            kept = from_main(lambda: read_record(self._path))
            if kept.get("identity") == self._identity:
                self.base, self.responses = kept["base"], kept["responses"]
            return
        self.base, self.responses = self._measure()
        if is_main():
            kept = {"identity": self._identity, "base": self.base, "responses": self.responses}
            write_json(self._path, kept)


def measure(
    trainer: AlignmentTrainer, source: TrainingSource, testbed: Testbed | None, args: TrainingPlan, label: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the model now. Return numbers, and on the testbed the judged responses that they come from.

    Safety is measured on the testbed, with its oracle. For other models the held-out loss is measured here (and how
    often DPO's reward prefers the chosen response), and refusals of `--measure_prompts`. The numbers also go to the
    trainer's log, and so to the trackers of `report_to`. All processes must call it.

    Args:
        trainer: with its model.
        source: of the tokenizer.
        testbed: if the model is one's.
        args: of the training.
        label: of the model: `base`, which training starts from, or `trained`.
    """
    evaluated, measures = trainer.evaluate(), args.of(MeasureOptions)
    loss = evaluated["eval_loss"]
    if not math.isfinite(loss):
        if label == "base":
            raise InputError(f"the loss on held-out pairs is {loss} before training; try --dtype float32")
        raise InputError(f"the loss on held-out pairs is {loss}: training diverged; choose a smaller --learning_rate")
    numbers: dict[str, Any] = {"held_out_loss": loss}
    if args.method == "dpo":
        numbers["held_out_reward_accuracy"] = evaluated["eval_rewards/accuracies"]
        numbers["held_out_reward_margin"] = evaluated["eval_rewards/margins"]
    rows: list[dict[str, Any]] = []
    if testbed is not None:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        result = requests.measure(model, source.tokenizer, testbed, args.data.eval_examples)
        numbers |= {name: value.to_json() for name, value in requests.numbers(result).items()}
        rows = [{"model": label, **row} for row in requests.judged_rows(result, testbed.world)]
    elif measures.measure_prompts:
        numbers |= _refusals(trainer, source, measures)
    # `evaluate` left the model in evaluation mode, so that TRL keeps its numbers of the training for other rows.
    trainer.log(as_numbers(numbers, LOGGED))
    return numbers, rows


def _refusals(trainer: AlignmentTrainer, source: TrainingSource, measures: MeasureOptions) -> dict[str, Any]:
    """Return refusal and over-refusal rates, by the judge rules."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    result = evaluate_model(
        model,
        source.tokenizer,
        measures.measure_prompts,
        "rules",
        n_prompts=measures.measure_n_prompts,
        part="validation",  # so that settings can be chosen by it
        max_new_tokens=N_TOKENS,
        progress=False,
    )
    rates = result.rates()
    return {name: rates[name].to_json() for name in ("refusal_rate", "over_refusal_rate") if name in rates}


def measure_while_training(trainer: AlignmentTrainer, every_n_steps: int, measure: Callable[[], object]) -> None:
    """Measure a trainer's model after every n steps, which changes nothing in the training."""

    def probe(model: PreTrainedModel) -> dict[str, float]:
        if trainer.state.global_step > 0:  # before the first step `MeasureStart` measures
            asked = dict(vars(trainer.control))  # of this step; evaluating and logging would count as done
            measure()
            vars(trainer.control).update(asked)
        return {}

    trainer.add_callback(LearningCurveCallback(every_n_steps, probe))


def learning_curve(logs: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return the measurements in a trainer's log; of those of one step the last, which is of what was saved.

    Those before a training was resumed are among them: checkpoints keep the log.
    """
    rows = {row["step"]: row for row in logs if f"{LOGGED}held_out_loss" in row}
    return [
        {"step": step} | {name.removeprefix(LOGGED): row[name] for name in row if name.startswith(LOGGED)}
        for step, row in rows.items()
    ]
