"""Average the weights over the steps, and end with the average (`--ema_half_life`).

"Rethinking Safety in LLM Fine-tuning: An Optimization Perspective" (arXiv 2508.12531) finds that an exponential moving
average of the weights keeps more of a model's safety in further training. For each trained weight theta, a shadow s:

    s_0 = theta_0,    s_t = eta s_(t-1) + (1 - eta) theta_t    after optimizer step t

The optimizer goes on from theta and never sees s. (Putting s in the place of theta at every step would only multiply
the learning rate by 1 - eta.) When training ends, s takes the place of theta.

<checkpoint>/ema.safetensors   the shadow; the checkpoint's own weights are theta, so that training resumes exactly
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sails_align.core.errors import InputError
from sails_align.training.callbacks.engines import refuse_parts
from sails_align.training.callbacks.options import EmaOptions
from sails_align.training.callbacks.resumed import checkpoint_of, read_tensors, resumed_from

FILE = "ema.safetensors"


def attach(trainer: Trainer, init: object, plan: Any) -> None:
    """Add the callback to trainings that ask for it."""
    half_life = plan.of(EmaOptions).ema_half_life
    if half_life is not None:
        trainer.add_callback(WeightAverage(eta_of(half_life)))


def eta_of(half_life: float) -> float:
    """Return the share of the shadow that a step keeps, such that after `half_life` steps half of it is left."""
    return 0.5 ** (1 / half_life)


class WeightAverage(TrainerCallback):
    """Keep an exponential moving average of the trained weights, and put it into the model when training ends.

    The average is kept in float32 at least: in bfloat16 it would lose what a step adds to it. With `eta` 0 the result
    is that of the training without the callback, and with 1 the model that it started from, both bit for bit.

    A resumed training reads the average from the checkpoint in its output folder, or from the one that its arguments
    name as `resume_from_checkpoint`.

    Examples:
        >>> average = sails.WeightAverage(eta=0.99)  # for a trainer: callbacks=[average]
    """

    def __init__(self, eta: float) -> None:
        """Take the share of the average that a step keeps; raise `InputError` if it is not between 0 and 1."""
        if not 0 <= eta <= 1:
            raise InputError(f"eta is {eta}; choose a value from 0 (no average) to 1 (no training)")
        self.eta = eta
        self.shadow: dict[str, Tensor] = {}
        "Name of the trained parameter -> its average."

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        refuse_parts("an average of the weights")
        self.shadow = {name: _copy(parameter) for name, parameter in _trained(model).items()}
        if state.global_step > 0:
            self._load(resumed_from(args, state) / FILE)

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        # Once for each optimizer step, however many batches it has, and after all that other callbacks write.
        for name, parameter in _trained(model).items():
            self.shadow[name].lerp_(parameter.detach().to(self.shadow[name].dtype), 1 - self.eta)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_file(self.shadow, checkpoint_of(args, state) / FILE)

    @torch.no_grad()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        for name, parameter in _trained(model).items():
            parameter.copy_(self.shadow[name])

    def _load(self, path: Path) -> None:
        """Take the shadow of a checkpoint."""
        loaded = read_tensors(path, "the average of the weights")
        shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (loaded, self.shadow)]
        if shapes[0] != shapes[1]:
            raise InputError(f"{path} is of other weights than are trained here; resume with the options of its run")
        for name, tensor in loaded.items():
            self.shadow[name].copy_(tensor)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name; a shared one is there once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _copy(parameter: nn.Parameter) -> Tensor:
    """Return a copy in float32, or in float64 if the parameter is."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True).contiguous()
