"""List our own option classes of a training; TRL's and PEFT's come in addition."""

from dataclasses import asdict, dataclass

from sails_align.core.options import OutputOptions, check_least, check_positive, option
from sails_align.data.options import DataOptions
from sails_align.data.transforms import TRANSFORMS
from sails_align.initializers import INITIALIZERS
from sails_align.initializers.options import InitializerOptions
from sails_align.subspace.options import DPOOptions, Method
from sails_align.training.callbacks import CALLBACKS
from sails_align.training.losses import LOSSES
from sails_align.training.losses.options import LossOptions


@dataclass(frozen=True)
class MeasureOptions:
    """Measurements while the model trains."""

    measure_steps: int | None = option(
        None,
        "Measure the model every so many steps, and not only before and after: on the testbed the rates, else the loss "
        "on held-out data.",
    )
    measure_prompts: list[str] = option(
        [],
        "Prompt sets, such as twins, on which refusals are measured, too, by the judge rules: names or files. Of sets "
        "with parts it is the validation part. Not for the testbed, whose rates are always measured.",
    )
    measure_n_prompts: int = option(16, "Prompts of each of these sets, balanced over categories.")

    def __post_init__(self) -> None:
        check_least(self, measure_steps=1, measure_n_prompts=1)


def entry_options() -> list[type]:
    """Return the options of the loss, and those of initializations, transforms, callbacks and losses."""
    entries = [entry for registry in (INITIALIZERS, TRANSFORMS, CALLBACKS, LOSSES) for _, entry in registry.items()]
    return [LossOptions, *(entry.options for entry in entries if entry.options is not None)]


def own_options(method: Method) -> list[type]:
    """Return all our options of a method's training."""
    return [
        InitializerOptions,
        DataOptions,
        OutputOptions,
        MeasureOptions,
        *entry_options(),
        *([DPOOptions] if method == "dpo" else []),
    ]


@dataclass(frozen=True)
class Gpus:
    """GPUs that a training is estimated for."""

    num_gpus: int = option(1, "GPUs of all machines together.")
    gpus_per_node: int = option(8, "GPUs of one machine, at most.")
    gpu_memory_gib: float = option(80.0, "Memory of a GPU in GiB.")

    def __post_init__(self) -> None:
        check_positive(self, *asdict(self))
