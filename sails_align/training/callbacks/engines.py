"""Refuse engines under which a callback cannot write parameters."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from sails_align.core.errors import InputError


def refuse_parts(what: str) -> None:
    """Raise `InputError` under DeepSpeed and FSDP; `what` is what would write parameters.

    Their optimizers keep copies or parts of the parameters, so that what is written to these is lost or wrong.
    """
    engine = AcceleratorState().distributed_type
    if engine in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise InputError(
            f"{what} does not work with {engine.value}, which trains copies or parts of the weights;\n"
            "leave it out, or train on one GPU or with DDP"
        )
