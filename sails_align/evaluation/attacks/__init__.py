"""Attacks on harmful prompts, one in each module. Layers above register sets of wrappers."""

from dataclasses import dataclass
from pathlib import Path

from sails_align.core.registry import Entry, Registry
from sails_align.evaluation.attacks.options import GcgOptions, PrefillArguments, TransferArguments, WrapperArguments
from sails_align.models.spec import ModelSpec

FOLDER = "sails_align.evaluation.attacks"
ATTACKS = Registry(
    "attack",
    {
        "gcg": Entry(f"{FOLDER}.gcg:attack", "Search for adversarial suffixes by gradients.", GcgOptions),
        "wrappers": Entry(f"{FOLDER}.wrappers:attack", "Try known jailbreak templates.", WrapperArguments),
        "transfer": Entry(
            f"{FOLDER}.transfer:attack", "Try suffixes that were found on another model.", TransferArguments
        ),
        "prefill": Entry(
            f"{FOLDER}.prefill:attack", "Force answers to begin with words of a harmful one.", PrefillArguments
        ),
    },
)
"""Each is a function of its options, the prompts and a `Setting`; it returns the prompts under attack."""
WRAPPER_SETS = Registry("set of wrappers", {"general": Entry(f"{FOLDER}.wrappers:WRAPPERS", "For any model.")})
"""Each is a mapping of wrappers by name."""


@dataclass(frozen=True)
class Setting:
    """What an attack needs besides its options."""

    spec: ModelSpec | None
    """The model, if it runs in this process."""
    folder: Path
    """Folder for the states of searches."""
    seed: int = 0
    batch_size: int = 32
    progress: bool = True
