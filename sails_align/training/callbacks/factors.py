"""What callbacks need to reach the factors of an adapter."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from sails_align.initializers.adapter import ModuleInit


def distributed_type() -> DistributedType:
    """How accelerate distributes this training."""
    return AcceleratorState().distributed_type


def lora_factor(model: nn.Module, module: ModuleInit, side: str, adapter_name: str) -> nn.Parameter:
    """Return lora_A (R, in) or lora_B (out, R) of a module."""
    return model.get_parameter(f"{module.name}.lora_{side}.{adapter_name}.weight")
