"""Options of the data and of its transforms (`data/transforms`)."""

from dataclasses import dataclass

from sails_align.core.errors import InputError
from sails_align.core.options import check_choices, check_least, option


@dataclass(frozen=True)
class DataOptions:
    """Options of the data, in addition to TRL's `--dataset_name`, `--dataset_config` and the splits."""

    helpful_dataset_name: str | None = option(
        None,
        "Dataset of harmless requests. It is mixed into the training data, and its prompts are the harmless side of "
        "the prompt contrast.",
    )
    helpful_dataset_config: str | None = option(None, "Configuration of that dataset.")
    helpful_dataset_split: str = option("train", "Split of that dataset.")
    max_train_examples: int | None = option(None, "Maximum number of safety examples to train on, chosen by --seed.")
    eval_examples: int = option(
        256,
        "Number of held-out pairs for the loss (taken from the training split if there is no test split); on the "
        "testbed, prompts of each test set.",
    )
    on_bad_rows: str = option(
        "error",
        "What to do with unusable rows: error (stop and report them) or skip (leave them out and count them).",
    )

    def __post_init__(self) -> None:
        check_choices(self, {"on_bad_rows": ("error", "skip")})
        check_least(self, eval_examples=1, max_train_examples=1)


@dataclass(frozen=True)
class ContaminateOptions:
    """Options of the transform `contaminate`."""

    contamination: float = option(
        0.0,
        "Share of safety pairs, chosen by --seed, whose chosen and rejected responses are swapped, to study the effect "
        "of wrong labels.",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.contamination <= 1:
            raise InputError(f"contamination is {self.contamination}, but it is a share; choose a value from 0 to 1")


@dataclass(frozen=True)
class MixOptions:
    """Options of the transform `mix`."""

    helpful_ratio: float = option(1.0, "Number of helpful examples for each safety example.")

    def __post_init__(self) -> None:
        check_least(self, helpful_ratio=0)
