"""Log how large the adapter's update is, and how far it has left the subspace.

Shapes: M modules, D d_model, R rank, O the other width of a module (of its output if it reads the residual stream,
else of its input).
"""

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sails_align.core.linalg import orthonormalize, principal_angles
from sails_align.initializers.adapter import AdapterInit, ModuleInit

logger = logging.getLogger(__name__)


def attach(trainer: Trainer, init: AdapterInit | None, plan: object) -> None:
    """Add the callback to trainings whose adapter starts in a subspace."""
    if init is not None:
        add_first(trainer, DriftCallback(init))


def add_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Add a callback that runs before all others.

    transformers runs the `report_to` callbacks before those given to the Trainer, so that what an ordinary callback
    adds to the logs reaches neither wandb nor tensorboard.
    """
    trainer.callback_handler.callbacks.insert(0, callback)


class DriftCallback(TrainerCallback):
    """Add to each row of training logs how large the update is, and how far it has left the subspace.

    `adapter_update_norm`: Frobenius norm of all updates (scaling * B @ A) together. `adapter_A_norm` and
    `adapter_B_norm`: the same of the factors. `adapter_energy_inside`: share of the squared norm of the updates that
    lies in the subspace, on the side of the residual stream (random directions that fill the rank do not count as
    subspace). `adapter_largest_angle`: between the span of what the initialized side is and was, in radians; the
    largest principal angle of any module.

    To reach `report_to`, add it with `add_first`. Modules of one shape are measured together, on their own device.

    Examples:
        >>> drift = sails.DriftCallback(init)  # for a trainer: callbacks=[drift]
        >>> drift.measure(adapted)["adapter_update_norm"]
        0.0
    """

    def __init__(self, init: AdapterInit) -> None:
        self._init, self._off = init, False
        self._bases = {
            module.name: orthonormalize(_residual_side(init.initial[module.name], module.side).double().cpu())
            for module in init.modules
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        is_fsdp2 = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        self._off = AcceleratorState().distributed_type == DistributedType.FSDP and not is_fsdp2
        if self._off and state.is_world_process_zero:
            logger.warning("the adapter's drift is not logged: FSDP1 keeps its parameters in one flat tensor")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        # Not in the rows of evaluations, nor in the last one.
        if "loss" in logs and not self._off:
            drift = self.measure(model)  # by all processes: under ZeRO-3 and FSDP2 each holds a part
            logs.update(drift)  # for the callbacks after this one
            state.log_history[-1].update(drift)  # a copy, made before the callbacks run

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure a model now. Return the numbers above by name."""
        factors = [self._init.factor(model, module, side) for module in self._init.modules for side in "AB"]
        with gather_params_ctx(factors, modifier_rank=None):
            return self._measure(model)

    def _measure(self, model: nn.Module) -> dict[str, float]:
        groups: dict[object, list[tuple[ModuleInit, torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for module in self._init.modules:
            factor_A, factor_B = (_whole(self._init.factor(model, module, side)) for side in "AB")
            groups[module.side, factor_A.shape, factor_B.shape, factor_A.device].append((module, factor_A, factor_B))
        measured = [self._measure_group(model, group) for group in groups.values()]
        # Read only when all are measured: each read waits for the GPU.
        measured_G5 = torch.stack([numbers.cpu() for numbers in measured])
        squares_A, squares_B, total, inside = measured_G5[:, :4].sum(0).tolist()
        return {
            "adapter_update_norm": math.sqrt(max(total, 0.0)),
            "adapter_A_norm": math.sqrt(squares_A),
            "adapter_B_norm": math.sqrt(squares_B),
            "adapter_energy_inside": inside / total if total > 0 else 0.0,
            "adapter_largest_angle": measured_G5[:, 4].max().item(),
        }

    def _measure_group(
        self, model: nn.Module, group: Sequence[tuple[ModuleInit, torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Measure modules of one shape, each with its factors A and B.

        Returns:
            squared norms of A, of B, of the updates, and of the updates in the subspace; the largest angle. (5,)
        """
        modules, factors_A, factors_B = zip(*group, strict=True)
        A_MRO, B_MOR = torch.stack(factors_A).double(), torch.stack(factors_B).double()
        side_MDR, other_MOR = (A_MRO.mT, B_MOR) if modules[0].side == "A" else (B_MOR, A_MRO.mT)
        basis_MDR = torch.stack([self._bases[module.name] for module in modules]).to(side_MDR.device)
        scaling_M = torch.tensor([_scaling(model, module, self._init.adapter_name) for module in modules])
        n_directions_M = torch.tensor([module.n_directions for module in modules])
        is_direction_MR = torch.arange(side_MDR.shape[2]) < n_directions_M[:, None]
        # The update is side_MDR @ other_MOR.mT (or its transpose); its norms need only R x R matrices.
        gram_MRR = other_MOR.mT @ other_MOR * scaling_M.to(side_MDR)[:, None, None] ** 2
        projected_MRR = basis_MDR.mT @ side_MDR * is_direction_MR.to(side_MDR)[:, :, None]
        total = (side_MDR.mT @ side_MDR * gram_MRR).sum()
        inside = (projected_MRR.mT @ projected_MRR * gram_MRR).sum()
        angle = principal_angles(orthonormalize(side_MDR), basis_MDR).max()
        return torch.stack([A_MRO.square().sum(), B_MOR.square().sum(), total, inside, angle])


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _scaling(model: nn.Module, module: ModuleInit, adapter_name: str) -> float:
    """Return the factor of B @ A: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    layer = model.get_submodule(module.name)
    assert isinstance(layer, LoraLayer), "initialized modules are LoRA layers"
    return layer.scaling[adapter_name]


def _residual_side(factor: torch.Tensor, side: str) -> torch.Tensor:
    """Return the factor (D, R) that touches the residual stream, with directions as columns."""
    return factor.T if side == "A" else factor
