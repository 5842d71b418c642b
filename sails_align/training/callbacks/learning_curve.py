"""Measure the model while it is trained."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sails_align.core.errors import InputError
from sails_align.models.hooks import evaluation_mode


class LearningCurveCallback(TrainerCallback):
    """Measure the model before the first step and after every n steps.

    The probe sees the model in evaluation mode and without gradients. PyTorch's random state is restored afterwards, so
    that a run with probes gives the same model as one without. All processes run the probe.

    Examples:
        >>> def probe(model):
        ...     rates = sails.evaluate(model, tokenizer, "testbed", n_prompts=8, progress=False).rates()
        ...     return {name: rate.value for name, rate in rates.items()}
        >>> curve = sails.LearningCurveCallback(8, probe)  # for a trainer: callbacks=[curve]
    """

    def __init__(self, every_n_steps: int, probe: Callable[[PreTrainedModel], dict[str, float]]) -> None:
        if every_n_steps < 1:
            raise InputError(f"every_n_steps is {every_n_steps}; choose 1 or more")
        self._every_n_steps, self._probe = every_n_steps, probe
        self.rows: list[tuple[int, dict[str, float]]] = []
        "(step, values): what the probe returned after that many optimizer steps."

    def steps_to(self, name: str, threshold: float) -> int | None:
        """Return the first step at which a value was at least the threshold; None if it never was."""
        return next((step for step, values in self.rows if values[name] >= threshold), None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:  # not when resuming
            self._run(kwargs["model"], 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._every_n_steps == 0:
            self._run(kwargs["model"], state.global_step)

    def _run(self, model: PreTrainedModel, step: int) -> None:
        devices = [model.device] if model.device.type == "cuda" else []
        with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(devices):
            self.rows.append((step, self._probe(model)))
