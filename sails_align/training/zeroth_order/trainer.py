"""Train an adapter by zeroth-order steps, with differential privacy if asked to (`--zeroth_order true`).

MeZO (arXiv 2305.17333) steps along a random direction z by the slope of the loss along it; DP-ZO makes this private
(DPZOPO, arXiv 2402.07818; arXiv 2401.04343; DPZero, arXiv 2310.09639). Of each step, with n examples expected in it:

    theta <- theta - lr * s z,    s = (sum_i clip(g_i, -C, C) + N(0, (sigma C)^2)) / n

averaged over K directions, where g_i is the slope of the loss of example i, which is the mean over its tokens
(`estimate`). The K numbers s of a step together have K times the sensitivity C^2, so that its noise multiplier is
sigma / sqrt(K) (`accounting`). Without privacy, s is the mean slope.

Training has no dropout, and no gradients: s z is given to plain SGD in place of one.

<checkpoint>/zeroth_order.json   the noise and the secret that it is drawn from; do not publish it
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.core.log import say
from sails_align.models.hooks import evaluation_mode
from sails_align.training.callbacks.reporting import ReportingCallback
from sails_align.training.callbacks.resumed import checkpoint_of, read_values, resumed_from
from sails_align.training.zeroth_order.accounting import sigma_for, spent_epsilon
from sails_align.training.zeroth_order.batches import PrivateBatches, collated
from sails_align.training.zeroth_order.estimate import directions, noisy_sum, slopes
from sails_align.training.zeroth_order.options import ZerothOrderOptions
from sails_align.training.zeroth_order.randomness import Secret, torch_generator

FILE = "zeroth_order.json"


def with_zeroth_order(trainer_class: type[SFTTrainer]) -> type[SFTTrainer]:
    """Return the trainer's class with steps and batches of the `ZerothOrder` that `attach` gives it."""

    def training_step(self: Any, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        return self.zeroth_order.step(self._prepare_inputs(inputs))

    def get_train_dataloader(self: Any) -> DataLoader:
        if self.zeroth_order.batches is None:
            return trainer_class.get_train_dataloader(self)
        data = self._remove_unused_columns(self.train_dataset, description="training")
        collate = self.data_collator
        loader = DataLoader(
            data, batch_sampler=self.zeroth_order.batches, collate_fn=lambda rows: collated(collate, rows)
        )
        return self.accelerator.prepare(loader)

    def get_total_train_batch_size(self: Any, args: TrainingArguments) -> int:
        batches = self.zeroth_order.batches
        return trainer_class.get_total_train_batch_size(self, args) if batches is None else batches.batch_size

    own = {
        "training_step": training_step,
        "get_train_dataloader": get_train_dataloader,
        "get_total_train_batch_size": get_total_train_batch_size,
        "zeroth_order": None,
    }
    made: Any = type(trainer_class.__name__, (trainer_class,), own)
    return made


def attach(trainer: Any, init: object, plan: Any) -> None:
    """Give the steps to a trainer that asks for them."""
    options = plan.of(ZerothOrderOptions)
    if options.zeroth_order:
        trainer.zeroth_order = ZerothOrder(trainer, options)
        trainer.add_callback(trainer.zeroth_order)


class ZerothOrder(ReportingCallback):
    """Make the steps, and account for what they reveal of the data."""

    def __init__(self, trainer: Any, options: ZerothOrderOptions) -> None:
        """Take the trainer; raise `InputError` if the options do not suit the number of its examples."""
        n = len(trainer.train_dataset)
        self._trainer, self._options, self._n_steps = trainer, options, 0
        self.secret, self.sigma = Secret.new(options.dp_noise_seed), options.dp_sigma or 0.0
        self.batches: PrivateBatches | None = None
        "Of private steps; None: the trainer's own."
        if options.is_private and options.dp_delta >= 1 / n:
            raise InputError(
                f"dp_delta is {options.dp_delta:g}, but there are {n} examples, and it must be below 1/{n}: otherwise "
                "revealing one of them\nwould count as private; choose a smaller one"
            )
        if options.is_clipped:
            if (size := options.dp_batch_size) is not None and size > n:
                raise InputError(f"dp_batch_size is {size}, but there are {n} examples; choose at most as many")
            self.batches = PrivateBatches(n, options.dp_batch_size, lambda *names: self.secret.rng(*names))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the noise by the number of steps, or when resuming, check that it is the same."""
        options = self._options
        if options.is_private and options.dp_epsilon is not None:
            assert self.batches is not None
            scale = math.sqrt(options.zo_directions)
            self.sigma = scale * sigma_for(options.dp_epsilon, options.dp_delta, state.max_steps, self.batches.rate)
        if state.global_step > 0:
            self._load(resumed_from(args, state) / FILE)
            self._n_steps = state.global_step
        if options.is_private:
            assert self.batches is not None
            each = f"each of {self.batches.n:,} examples is in a step with probability {self.batches.rate:.3g}"
            say(f"    private: {each}; noise multiplier {self.sigma:.4g}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the noise and its secret."""
        path = checkpoint_of(args, state) / FILE
        write_json(path, {"sigma": self.sigma, "secret": self.secret.key}, is_secret=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the steps that are in the result."""
        self._n_steps = state.global_step

    def report(self) -> dict[str, Any]:
        """Return the privacy that the steps have spent; nothing if they are not private."""
        options, batches = self._options, self.batches
        if not options.is_private or batches is None:
            return {}
        sigma = self.sigma / math.sqrt(options.zo_directions)
        return {
            "privacy": {
                "epsilon": spent_epsilon(sigma, options.dp_delta, self._n_steps, batches.rate),
                "delta": options.dp_delta,
                "neighbours": "one example more or less",
                "sampling": "all examples in every step" if batches.rate >= 1 else "Poisson",
                "sampling_rate": batches.rate,
                "accountant": "Gaussian, exact" if batches.rate >= 1 else "Renyi, an upper bound",
                "noise_multiplier": self.sigma,
                "clip": options.dp_clip,
                "steps": self._n_steps,
                "directions": options.zo_directions,
                "noise_is_secret": options.dp_noise_seed is None,
            }
        }

    def step(self, inputs: dict[str, Tensor]) -> Tensor:
        """Give the parameters the estimate in place of a gradient. Returns the mean loss of the examples."""
        options, trainer, step = self._options, self._trainer, self._trainer.state.global_step
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        total = [torch.zeros_like(parameter) for parameter in trained]
        losses = []
        with evaluation_mode(trainer.model):
            for k in range(options.zo_directions):
                direction = directions(trained, torch_generator("direction", trainer.args.seed, step, k))
                slope_B, loss_B = slopes(trained, direction, options.zo_eps, lambda: self.losses(inputs))
                losses.append(loss_B)
                scale = self._released(slope_B, step, k) / options.zo_directions
                for estimate, z in zip(total, direction, strict=True):
                    estimate.add_(z, alpha=scale)
        for parameter, estimate in zip(trained, total, strict=True):
            parameter.grad = estimate
        loss = torch.cat(losses)
        return (loss.mean() if len(loss) else loss.sum()).float().detach()

    def _released(self, slope_B: Tensor, step: int, k: int) -> float:
        """Return the slope of the batch along a direction."""
        if self.batches is None:
            return slope_B.mean().item()
        noise = float(self.secret.rng("noise", step, k).standard_normal())
        return noisy_sum(slope_B, self._options.dp_clip, self.sigma, noise) / self.batches.batch_size

    @torch.no_grad()
    def losses(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the loss of each example, the mean over its tokens, with a forward pass for a few at a time. (B,)"""
        trainer, size = self._trainer, self._trainer.args.per_device_train_batch_size
        found = [torch.zeros(0, device=inputs["input_ids"].device)]
        for start in range(0, len(inputs["input_ids"]), size):
            rows = {name: of[start : start + size] for name, of in inputs.items()}
            length = int(rows["attention_mask"].sum(1).max())  # TRL pads on the right, to the longest of all
            rows = {name: of[:, :length] for name, of in rows.items()}
            with trainer.compute_loss_context_manager():
                outputs = trainer.model(**rows, use_cache=False, fused_lm_head=True)
            found.append(-outputs.log_probs.float().sum(1) / outputs.label_mask.sum(1).clamp(min=1))
        return torch.cat(found)

    def _load(self, path: Path) -> None:
        """Take the secret of a checkpoint, and check that the noise is that of its steps."""
        kept = read_values(path, "with the same noise")
        if not {"sigma", "secret"} <= kept.keys():
            raise InputError(f"cannot resume with the same noise: {path} lacks it; start again")
        if not math.isclose(kept["sigma"], self.sigma, rel_tol=1e-9):
            raise InputError(
                f"the noise of {path.parent} was made for another number of steps: its multiplier is "
                f"{kept['sigma']:.4g}, and for dp_epsilon {self._options.dp_epsilon} in as many steps as now it would "
                f"be {self.sigma:.4g};\ntrain for as many steps as then, or start again"
            )
        self.secret = Secret(kept["secret"])
