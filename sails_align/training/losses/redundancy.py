"""Keep groups of an adapter's rows from computing the same.

ReSoRA (arXiv 2507.20745) splits low-rank matrices into subspaces, and adds "de-redundancy" constraints on the
distributions of what they project to, with adaptive weights. Its formula could not be had: the one here is ours. The r
rows of lora_A are split into groups, A_g. For the tokens x of a batch, z_g = A_g (x - mean x), and the penalty of two
groups is their linear CKA (arXiv 1905.00414):

    |z_g^T z_h|_F^2 / (|z_g^T z_g|_F |z_h^T z_h|_F)

It is 0 where all features of one group are uncorrelated with those of the other, and 1 where the groups span the same
features. The mean over pairs of groups and over modules is added to TRL's loss, so that its share of the loss stays
`redundancy_weight`, as far as running means tell. The inputs are taken as constants, so that the penalty trains A and
not the modules before it. With the form `weights` the inputs are taken to be white: of A A^T, and likewise of lora_B's
columns.

Factors that start at zero are left alone: of a scale-free penalty, the gradient has no bound near zero.

Shapes: B batch, S sequence, T tokens, R rank, I inputs and O outputs of a module, G groups.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from trl import DPOConfig, SFTConfig

from sails_align.core.errors import InputError
from sails_align.models.hooks import at_tokens
from sails_align.models.inputs import watched_inputs
from sails_align.training.losses.compose import LossStep, check_not_compiled
from sails_align.training.losses.options import RedundancyOptions

KEPT = 0.9
"""Share of the running means that a batch keeps."""
FLOOR = 0.01
"""The running penalty counts as at least this, so that its weight stays finite where nothing is redundant."""


class Redundancy:
    """TRL's loss, and the redundancy of the trained adapter's groups."""

    def __init__(self, options: RedundancyOptions, training: SFTConfig | DPOConfig) -> None:
        """Take the options; raise `InputError` with torch_compile, which does not run hooks."""
        check_not_compiled("redundancy", training)
        self._options = options
        self._running = RunningMeans()
        self._factors: dict[str, str] = {}
        self._inputs: dict[str, Tensor] = {}

    def begin(self, trainer: Any) -> None:
        """Find the factors that are trained and do not start at zero; raise `InputError` if there are none."""
        sides = ("A",) if self._options.redundancy_form == "features" else ("A", "B")
        for name, module in trainer.model.named_modules():
            for side in sides if isinstance(module, LoraLayer) else ():
                path = f"{name}.lora_{side}.default"
                weight = trainer.model.get_submodule(path).weight
                if weight.requires_grad and weight.detach().any():
                    self._check_rank(path, module.r["default"])
                    self._factors[path] = side
        if not self._factors:
            raise InputError(
                f"loss is redundancy, but no lora_{' or lora_'.join(sides)} is both trained and different from zero at "
                "the start;\nuse --subspace_mode init, another --init, or leave the loss out"
            )
        trainer.add_callback(self._running)

    def _check_rank(self, path: str, rank: int) -> None:
        if (groups := self._options.redundancy_groups) > rank:
            raise InputError(f"redundancy_groups is {groups}, but {path} has rank {rank}; choose at most that")

    @contextmanager
    def watch(self, model: Any) -> Iterator[None]:
        """Keep what each adapter reads in a forward pass, if the penalty needs it."""
        self._inputs = {}
        if self._options.redundancy_form == "weights" or self._options.redundancy_weight == 0:
            yield
            return
        with watched_inputs(model, self._factors, lambda name, x_BSI: self._inputs.update({name: x_BSI.detach()})):
            yield

    def __call__(self, step: LossStep) -> Tensor:
        """Return TRL's loss with the penalty, and log the penalty and its factor."""
        if self._options.redundancy_weight == 0:
            return step.loss
        model = step.trainer.accelerator.unwrap_model(step.model)
        with torch.autocast(step.loss.device.type, enabled=False):
            each = [
                redundancy(
                    self._gram(model.get_submodule(path).weight, path, step.batch), self._options.redundancy_groups
                )
                for path in self._factors
            ]
        self._inputs = {}
        penalty = torch.stack([value.to(step.loss.device) for value in each]).mean()
        loss, running = self._running.update(step.trainer.accelerator, step.loss.abs(), penalty)
        factor = self._options.redundancy_weight * loss / running.clamp(min=FLOOR)
        step.log("redundancy", penalty)
        step.log("redundancy_factor", factor)
        return step.loss + (factor * penalty).to(step.loss.dtype)

    def _gram(self, weight: Tensor, path: str, batch: dict[str, Tensor]) -> Tensor:
        """Return the products of a factor's features, over tokens, or of its rows (columns of lora_B). (R, R)"""
        if self._factors[path] == "B":
            return weight.float().T @ weight.float()
        if self._options.redundancy_form == "weights":
            return weight.float() @ weight.float().T
        mask_BS = batch.get("attention_mask")
        x_BSI = self._inputs[path]
        x_TI = x_BSI.flatten(0, 1) if mask_BS is None else at_tokens(x_BSI, mask_BS)
        features_TR = (x_TI.float() - x_TI.float().mean(0)) @ weight.float().T
        return features_TR.T @ features_TR


def redundancy(gram_RR: Tensor, n_groups: int) -> Tensor:
    """Return the mean linear CKA of pairs of groups of features, from 0 to 1. ()

    Args:
        gram_RR: the features' inner products over tokens. Consecutive features are a group.
        n_groups: from 2 to R; the first groups have one feature more if R is no multiple of it.
    """
    squares_RR = gram_RR.double().square()
    group_R = torch.repeat_interleave(
        torch.arange(n_groups), torch.tensor([len(part) for part in torch.arange(len(gram_RR)).tensor_split(n_groups)])
    )
    of_group_RG = torch.nn.functional.one_hot(group_R, n_groups).to(squares_RR)
    squares_GG = of_group_RG.T @ squares_RR @ of_group_RG
    own_G = squares_GG.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    first, second = torch.triu_indices(n_groups, n_groups, offset=1, device=squares_GG.device)
    return (squares_GG[first, second] / (own_G[first] * own_G[second])).mean()


class RunningMeans(TrainerCallback, ExportableState):
    """Exponential running means of the loss and the penalty, over batches and processes; checkpoints keep them."""

    def __init__(self) -> None:
        self._means: list[float] | None = None

    def update(self, accelerator: Any, loss: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        """Add a batch; return both means."""
        now_2 = torch.stack([loss.detach().double(), penalty.detach().double()])
        now_2 = accelerator.reduce(now_2, "mean")
        kept_2 = now_2 if self._means is None else now_2.new_tensor(self._means)
        means_2 = torch.lerp(now_2, kept_2, KEPT)
        self._means = means_2.tolist()
        return means_2[0], means_2[1]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {"means": self._means}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks: Any = state.stateful_callbacks or {}  # of a resumed training, those of the checkpoint
        saved = callbacks.get(type(self).__name__)
        self._means = None if saved is None else saved["attributes"]["means"]
