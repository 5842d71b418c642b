"""Log training as one short line for each log step, and show a bar on a terminal, in place of TRL's dictionaries."""

import time
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sails_align.core.log import duration, say
from sails_align.core.progress import progress_bar

SHOWN = {
    "loss": "loss {:.4g}",
    "rewards/accuracies": "reward accuracy {:.2f}",
    "rewards/margins": "margin {:.3g}",
    "reward": "reward {:.3g}",
    "learning_rate": "lr {:.2g}",
}
"""Of what TRL logs, the numbers in a line; `report_to` gets all of them."""
MEASURED = {
    "eval_safety_rate": "safety {:.1%}",
    "eval_refusal_rate": "refusals {:.1%}",
    "eval_over_refusal_rate": "over-refusal {:.1%}",
    "eval_correct_answer_rate": "correct {:.1%}",
}
HELD_OUT = {"eval_loss": "loss {:.4g}", "eval_rewards/accuracies": "reward accuracy {:.2f}"}


class StepLog(TrainerCallback):
    """Print loss, learning rate and time left of each log step, and the losses on held-out data."""

    def __init__(self, *, bar: bool) -> None:
        self._bar, self._task = progress_bar(bar), None
        self._began, self._first = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began, self._first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self._bar.start()
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        if self._task is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print what TRL logs."""
        if state.is_world_process_zero and logs:
            if numbers := _numbers(SHOWN, logs) if "loss" in logs else "":
                say(f"step {state.global_step} of {state.max_steps}: {numbers}{self._left(state)}")
            elif numbers := _numbers(HELD_OUT, logs):
                say(f"held-out data, step {state.global_step}: {numbers}")
            elif numbers := _numbers(MEASURED, logs):
                say(f"measured, step {state.global_step}: {numbers}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar."""
        self.stop()

    def stop(self) -> None:
        """Remove the bar, also if training failed."""
        if self._task is not None:
            self._task = None
            self._bar.stop()

    def _left(self, state: TrainerState) -> str:
        done, left = state.global_step - self._first, state.max_steps - state.global_step
        return f", {duration((time.monotonic() - self._began) / done * left)} left" if done and left else ""


def _numbers(shown: dict[str, str], logs: dict[str, Any]) -> str:
    return ", ".join(text.format(float(logs[name])) for name, text in shown.items() if name in logs)


def log_steps(trainer: Trainer) -> StepLog:
    """Log a trainer's steps in place of transformers' own way. `disable_tqdm` leaves the bar out."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    log = StepLog(bar=not trainer.args.disable_tqdm)
    trainer.add_callback(log)
    return log
