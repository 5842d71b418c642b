"""Coordinate the processes of one training. With one process, these functions do nothing.

The processes are those of `accelerate launch` or `torchrun`; they meet once transformers' training arguments are made.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from sails_align.core.errors import InputError

T = TypeVar("T")


def n_processes() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    """Return the rank of this process; 0 is the main process."""
    return dist.get_rank() if dist.is_initialized() else 0


def check_devices(use_cpu: bool) -> None:
    """Raise `InputError` for more processes here than GPUs, which CUDA would call an invalid device ordinal."""
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if wanted > 1 and not use_cpu and 0 < torch.cuda.device_count() < wanted:
        raise InputError(
            f"{wanted} processes are asked for on this machine, which has {torch.cuda.device_count()} GPU(s);\n"
            f"launch with --num_processes {torch.cuda.device_count()} (times the number of machines), "
            "or see CUDA_VISIBLE_DEVICES"
        )


def plain_cpu(training: TrainingArguments) -> None:
    """Call the CPU "cpu" where accelerate calls it "cpu:0", as it does for several processes.

    Neither torch.load, which reads the optimizer's state when a run is resumed, nor safetensors knows such a device.
    """
    if training.device.type == "cpu" and training.distributed_state is not None:
        training.distributed_state.device = torch.device("cpu")
        vars(training)["_setup_devices"] = torch.device("cpu")  # where transformers keeps it


def from_main(compute: Callable[[], T]) -> T:
    """Compute a value in the main process and return it in all. An `InputError` is raised in all of them.

    `compute` must not itself wait for other processes, which do not run it.
    """
    if n_processes() == 1:
        return compute()
    outcome: list[Any] = [None]  # one value, as torch wants it
    if process_index() == 0:
        try:
            outcome[0] = compute()
        except InputError as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome)
    value: Any = outcome[0]
    if isinstance(value, InputError):
        raise value
    return value


def gathered(value: T) -> list[T]:
    """Return the values of all processes in the order of ranks."""
    values: list[Any] = [value]
    if n_processes() > 1:
        values = [None] * n_processes()
        dist.all_gather_object(values, value)
    return values


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum over all processes of tensors of the same shape and dtype, on the tensor's device."""
    if n_processes() == 1:
        return tensor
    on_gpu = dist.get_backend() == "nccl"
    total = tensor.detach().to("cuda" if on_gpu else "cpu", copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)
