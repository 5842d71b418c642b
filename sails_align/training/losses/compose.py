"""Put a loss into TRL's SFTTrainer or DPOTrainer.

TRL advises to override `compute_loss`. The loss is given what TRL has computed: its own loss, and the outputs of the
model's forward pass (with the log-probability of each token), so that most losses need no pass of their own. In
evaluations TRL's loss stays, so that held-out losses can be compared.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from sails_align.core.errors import InputError


@dataclass(frozen=True, eq=False)
class LossStep:
    """What TRL has computed for a batch in training.

    Shapes: B batch (for DPO the chosen responses, then the rejected ones), S sequence.
    """

    trainer: Any
    """The SFTTrainer or DPOTrainer."""
    model: Any
    """What to call for another forward pass; wrapped, if the training is distributed."""
    batch: dict[str, Any]
    """The inputs: `input_ids` (B, S), and so on."""
    loss: Tensor
    """TRL's own loss."""
    outputs: Any
    """Of the model's forward pass: `log_probs` and `label_mask` (B, S - 1) of the next tokens, and `entropy` (SFT)."""
    num_items_in_batch: Tensor | int | None
    """Tokens that are trained on in the whole optimizer step, on all processes; None: the batch is averaged alone."""

    @property
    def per_token_scale(self) -> Tensor:
        """Return the factor of a sum over tokens in TRL's SFT loss."""
        n = self.outputs.label_mask.sum() if self.num_items_in_batch is None else self.num_items_in_batch
        # DDP averages gradients over the processes, and the count is of all of them.
        is_of_all = self.trainer.args.average_tokens_across_devices and self.num_items_in_batch is not None
        n_processes = self.trainer.accelerator.num_processes if is_of_all else 1
        return n_processes / torch.as_tensor(n).clamp(min=1)

    @property
    def batch_share(self) -> float:
        """Return the factor of a mean over a batch, in a loss that the Trainer adds up over an optimizer step."""
        is_divided = self.num_items_in_batch is None or not self.trainer.model_accepts_loss_kwargs
        return 1.0 if is_divided else 1 / self.trainer.current_gradient_accumulation_steps

    def log(self, name: str, value: Tensor) -> None:
        """Add a number to the next row of logs: its mean over batches and processes."""
        mean = self.trainer.accelerator.gather_for_metrics(value.detach()).mean().item()
        self.trainer._metrics["train"][name].append(mean)  # as TRL's own losses do


class Loss(Protocol):
    """A loss that is built on TRL's."""

    def begin(self, trainer: Any) -> None:
        """Take what it needs of a trainer that is ready to train, before a checkpoint is loaded."""
        ...

    def __call__(self, step: LossStep) -> Tensor:
        """Return the loss of a batch."""
        ...


@runtime_checkable
class Watching(Loss, Protocol):
    """A loss that looks into the forward pass which TRL makes for a batch."""

    def watch(self, model: Any) -> AbstractContextManager[None]:
        """Return what the policy's forward pass in training runs within, such as hooks; the model is not wrapped."""
        ...


@runtime_checkable
class Prepared(Loss, Protocol):
    """A loss that reads data of the training, or its model before anything is trained."""

    def prepare(self, trainer: Any, plan: Any, source: Any) -> None:
        """Take what it needs, before `begin`; `plan` is a `TrainingPlan` and `source` a `TrainingSource`."""
        ...


T = TypeVar("T", SFTTrainer, DPOTrainer)


def with_loss(trainer_class: type[T], loss: Loss | None) -> type[T]:
    """Return the trainer's class with another loss (None: the class as it is)."""
    if loss is None:
        return trainer_class

    def compute_loss(
        self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        own = trainer_class.compute_loss
        if not self.model.training:
            return own(self, model, inputs, return_outputs, num_items_in_batch)
        watched = loss.watch(self.accelerator.unwrap_model(model)) if isinstance(loss, Watching) else nullcontext()
        recorded = _Recorded(model, watched)
        result = own(self, recorded, inputs, return_outputs, num_items_in_batch)  # pyright: ignore[reportArgumentType]
        own_loss = result[0] if return_outputs else result
        # DPO's first call is of the policy; the reference, if it is called in the step, comes after it.
        value = loss(LossStep(self, model, inputs, own_loss, recorded.outputs[0], num_items_in_batch))
        return (value, result[1]) if return_outputs else value

    # The name is kept, since TRL writes it into tags and cards.
    return type(trainer_class.__name__, (trainer_class,), {"compute_loss": compute_loss})


def check_cross_entropy(name: str, training: SFTConfig | DPOConfig) -> None:
    """Raise `InputError` if TRL's loss is not the cross-entropy, which the loss of that name changes."""
    if not isinstance(training, SFTConfig):
        raise InputError(f"loss is {name}, which is for SFT only; leave it out")
    if training.loss_type not in (None, "nll"):
        raise InputError(f"loss is {name}, but loss_type is {training.loss_type}; leave one of them out")
    if training.label_smoothing_factor > 0:
        raise InputError(f"loss is {name}, but label_smoothing_factor is above 0; leave one of them out")


def check_not_compiled(name: str, training: SFTConfig | DPOConfig) -> None:
    """Raise `InputError` if the model is compiled, which skips the hooks that the loss of that name needs."""
    if training.torch_compile:
        raise InputError(
            f"loss is {name}, but torch_compile is true, which skips the hooks that it needs; leave out --torch_compile"
        )


class _Recorded:
    """Call a model and keep what it returns; the first call is watched."""

    def __init__(self, model: Any, watched: AbstractContextManager[None]) -> None:
        self._model, self._watched, self.outputs = model, watched, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.outputs else self._watched:
            self.outputs.append(self._model(*args, **kwargs))
        return self.outputs[-1]
