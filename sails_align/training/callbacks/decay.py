"""Pull the adapter back to the subspace it started in (`--subspace_mode decay`)."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sails_align.core.errors import InputError
from sails_align.initializers.adapter import AdapterInit
from sails_align.training.callbacks.engines import refuse_parts
from sails_align.training.callbacks.options import DecayOptions
from sails_align.training.plan import TrainingPlan


def attach(trainer: Trainer, init: AdapterInit | None, plan: TrainingPlan) -> None:
    """Add the callback to trainings that ask for it."""
    if init is not None and plan.sails.subspace_mode == "decay":
        trainer.add_callback(SubspaceDecay(init, plan.of(DecayOptions).subspace_decay))


class SubspaceDecay(TrainerCallback):
    """Pull the side of the adapter that took the directions back to them, after each optimizer step.

    Decoupled from the gradient, as AdamW's weight decay (towards 0) is: W <- W - lr * strength * (W - W_0).

    Examples:
        >>> decay = sails.SubspaceDecay(init, strength=1.0)  # for a trainer: callbacks=[decay]
    """

    def __init__(self, init: AdapterInit, strength: float) -> None:
        """Take what `initialize` returned, and the strength, which multiplies the learning rate.

        Raises `InputError` if the strength is not positive.
        """
        if not strength > 0:
            raise InputError(f"the decay's strength is {strength}; choose a value above 0, or leave the callback out")
        self._init, self._strength = init, strength
        self._pairs: list[tuple[nn.Parameter, torch.Tensor]] = []  # parameter, initial value

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        refuse_parts("subspace_mode decay")
        self._pairs = []
        for module in self._init.modules:
            parameter = self._init.factor(model, module, module.side)
            self._pairs.append((parameter, self._init.initial[module.name].to(parameter.device, parameter.dtype)))

    @torch.no_grad()
    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        # The scheduler has not stepped yet: this is the rate that the optimizer used.
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for parameter, initial in self._pairs:
            parameter.lerp_(initial, min(1.0, rates[id(parameter)] * self._strength))  # 1: all the way, not beyond
