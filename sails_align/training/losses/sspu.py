"""Unlearn what harmful answers are made of, within the subspace of the SAE features that are relevant to them.

SSPU (arXiv 2505.24428) unlearns in a subspace that SAE features span. No code of it is known; the formula here has the
form of RMU (arXiv 2403.03218), and is ours where the text that we have does not say:

    mean |h(x_forget) - c v|^2 + a mean |h(x_retain) - h_frozen(x_retain)|^2 + lambda sum_W |(I - P) (W - W_0)|^2

h is the output of a block. v is a random direction within the irrelevant features' span: U U^T xi, normalized, with xi
uniform. c is in units of the norm of h. P projects onto the relevant features' span, on the side of the residual
stream. In place of a lambda, the update is projected after each step, so that the last term is zero.

The texts to forget are the rejected responses to harmful requests, and those to retain the responses to harmless ones.
TRL's loss is computed for the logs alone. What is trained is an adapter, so that the frozen model is the same without
it.

Shapes: T tokens, D d_model, K features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, SFTConfig

from sails_align.core.log import say
from sails_align.initializers.targets import find_targets
from sails_align.training.callbacks.engines import refuse_parts
from sails_align.training.dataset import TrainingSource
from sails_align.training.losses.compose import LossStep, check_cross_entropy, check_not_compiled
from sails_align.training.losses.options import SspuOptions
from sails_align.training.losses.side_batches import SideBatches
from sails_align.training.losses.sspu_subspaces import AdaptedModule, Directions, find_directions, parts_of
from sails_align.training.losses.unlearning import UnlearningData, answer_states, frozen
from sails_align.training.plan import TrainingPlan


class SSPU:
    """Move hidden states of harmful answers to a random direction, and keep those of harmless ones."""

    def __init__(self, options: SspuOptions, training: SFTConfig | DPOConfig) -> None:
        """Take the options; raise `InputError` for DPO, and with torch_compile, which does not run hooks."""
        check_cross_entropy("sspu", training)
        check_not_compiled("sspu", training)
        self._options = options
        self.directions: Directions | None = None
        self.parts: list[AdaptedModule] = []

    def prepare(self, trainer: Any, plan: TrainingPlan, source: TrainingSource) -> None:
        """Find the directions; raise `InputError` if the SAEs or the data do not serve."""
        options, args = self._options, trainer.args
        data = UnlearningData.of("sspu", plan, source)
        found = find_directions(
            trainer.model, data, options.sspu_features, options.sspu_layer, options.sspu_control_seed
        )
        self.directions, self.parts = found, parts_of(trainer.model, find_targets(trainer.model, "default"), found)
        self._forget, self._retain = data.forget, data.retain  # and not the SAEs, which are done with
        size, seed = args.per_device_train_batch_size, args.seed
        self._forgotten = SideBatches(len(data.forget), size, seed)
        self._retained = SideBatches(len(data.retain), size, seed)
        most = ", ".join(map(str, found.features["relevant"][:8]))
        n = options.sspu_features
        say(f"    sspu: layer {found.layer}, {n} features more active in harmful answers, first of all {most}")

    def begin(self, trainer: Any) -> None:
        """Project the adapter, and from now on after each step, unless a lambda is given."""
        if self._options.sspu_lambda is None:
            for part in self.parts:
                part.project()
            trainer.add_callback(Projection(self.parts))

    def __call__(self, step: LossStep) -> Tensor:
        """Return the loss, and log its terms and the share of the update that is outside of the subspace."""
        assert self.directions is not None, "`prepare` comes first"
        turn, model = self._forgotten.turn(step.trainer), step.trainer.accelerator.unwrap_model(step.model)
        layer, retained = self.directions.layer, [self._retain[i] for i in self._retained.indices(turn)]
        with frozen(model):
            kept_TD = answer_states(model, [layer], retained)[layer]
        retain = mse_loss(answer_states(model, [layer], retained)[layer], kept_TD)
        forgotten = [self._forget[i] for i in self._forgotten.indices(turn)]
        moved_TD = answer_states(model, [layer], forgotten)[layer]
        target_D = self._options.sspu_scale * self.directions.norm * self.control(step.trainer.args.seed, turn)
        forget = mse_loss(moved_TD, target_D.to(moved_TD).expand_as(moved_TD))
        total, outside = torch.stack([torch.stack(part.energies()) for part in self.parts]).sum(0)
        step.log("sspu_forget", forget)
        step.log("sspu_retain", retain)
        step.log("sspu_outside", outside / total.clamp(min=torch.finfo(total.dtype).tiny))
        loss = forget + self._options.sspu_retain_weight * retain
        if self._options.sspu_lambda:
            loss = loss + self._options.sspu_lambda * outside
        return step.batch_share * loss.to(step.loss)

    def control(self, seed: int, turn: int) -> Tensor:
        """Return the unit vector that harmful answers are moved along; with `--sspu_vector step` another each time."""
        assert self.directions is not None, "`prepare` comes first"
        number = seed + turn if self._options.sspu_vector == "step" else seed
        return control_vector(self.directions.irrelevant, number)


def control_vector(basis_DK: Tensor, seed: int) -> Tensor:
    """Return the projection of a uniformly random vector onto a basis, normalized. (D,) float64"""
    xi_D = torch.rand(len(basis_DK), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    projected_D = basis_DK @ (basis_DK.T @ xi_D)
    return projected_D / projected_D.norm()


class Projection(TrainerCallback):
    """Project the adapters onto what they may change after each optimizer step."""

    def __init__(self, parts: list[AdaptedModule]) -> None:
        self._parts = parts

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_parts("loss sspu")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The parameters and not their gradients: the optimizer's moments would bring parts outside back.
        for part in self._parts:
            part.project()
