"""Options of guards."""

from dataclasses import dataclass, field
from pathlib import Path

from sails_align.core.errors import InputError
from sails_align.core.options import check_choice, check_least, option
from sails_align.edits.options import ContrastOptions

DIMENSIONS = (2, 8)
"""Least and most coordinates of a projector's output."""


@dataclass(frozen=True)
class GuardFitOptions(ContrastOptions):
    """Options of `sails guard fit`."""

    n_prompts: int = option(512, "Prompts of each dataset to fit on, at most; a fifth of them chooses the layer.")
    layer: int | None = option(
        None, "Layer whose hidden states are read. Default: the one with the best AUC on validation prompts."
    )
    control_seed: int | None = option(
        None, "Make a control in place of the guard: the labels harmful and harmless are shuffled by this seed."
    )
    chat_template_path: str | None = option(
        None, "Chat template for a model without one: a Jinja file, or human_assistant. It is kept with the guard."
    )
    dimension: int = option(4, "Coordinates of the space that the projector embeds prompts in: 2 to 8.")
    steps: int = option(300, "Steps of Adam.")
    contrastive_weight: float = option(0.1, "Weight of the supervised contrastive loss. 0: cross entropy only.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, steps=1, contrastive_weight=0)
        least, most = DIMENSIONS
        if not least <= self.dimension <= most:
            raise InputError(f"dimension is {self.dimension}; choose {least} to {most}")


@dataclass(frozen=True)
class GuardFolder:
    """The guard and its model."""

    guard: Path = field(metadata={"help": "Folder that `sails guard fit` made.", "positional": True})
    model: str | None = option(None, "The model that the guard was fitted on, if it has moved.")
    base_model: str | None = option(None, "Base model of an adapter, if it has moved.")
    device: str | None = option(None, "Where to compute, such as cpu or cuda:1. Default: a GPU if there is one.")


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of `sails guard calibrate`."""

    max_pass: float = option(0.05, "Largest share of harmful prompts that may pass the guard.")
    max_over_refusal: float = option(
        0.3, "Largest share of harmless prompts that it may refuse. A guard that may refuse more is not certified."
    )
    delta: float = option(0.05, "Probability with which each of the two bounds may be wrong.")

    def __post_init__(self) -> None:
        for name in ("max_pass", "max_over_refusal", "delta"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; choose a share above 0 and below 1")


@dataclass(frozen=True)
class SelectOptions:
    """Options of `sails guard select`."""

    dataset_name: str = field(metadata={"help": "Rows to train on: a file, a folder or a dataset on the hub."})
    output: str = field(metadata={"help": "File of JSON lines to write."})
    keep: str = option(
        "refused", "Rows to keep: those whose prompt the guard refused, or passed.", choices=("refused", "passed")
    )
    overwrite_output_dir: bool = option(False, "Replace the output file, if it is there.")

    def __post_init__(self) -> None:
        check_choice("keep", self.keep, ("refused", "passed"))
        if not self.output.endswith(".jsonl"):
            raise InputError(f"output is {self.output}; name a file that ends in .jsonl")
