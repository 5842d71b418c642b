"""The options of a training that are ours, as dataclasses; TRL's and PEFT's come beside them."""

from sails_align.data.options import DataOptions
from sails_align.data.transforms import TRANSFORMS
from sails_align.initializers.options import InitializerOptions
from sails_align.subspace.options import DPOOptions, Method
from sails_align.training.callbacks import CALLBACKS
from sails_align.training.losses import LOSSES
from sails_align.training.losses.options import LossOptions


def entry_options() -> list[type]:
    """Options of the loss, and those that transforms of the data, callbacks and losses bring."""
    entries = [entry for registry in (TRANSFORMS, CALLBACKS, LOSSES) for _, entry in registry.items()]
    return [LossOptions, *(entry.options for entry in entries if entry.options is not None)]


def own_options(method: Method) -> list[type]:
    """All our options of a training by a method."""
    return [InitializerOptions, DataOptions, *entry_options(), *([DPOOptions] if method == "dpo" else [])]
