"""Options of the edits of trained weights."""

from dataclasses import dataclass

from sails_align.core.options import check_choices, option

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergeOptions:
    """Options of the edit `merge`."""

    dtype: str | None = option(None, "Type of the merged weights. Default: the base model's.", choices=DTYPES)
    device: str | None = option(None, "Where to merge, such as cpu or cuda:1. Default: a GPU if there is one.")
    base_model: str | None = option(None, "The model it was trained on, if that is no longer where it was.")

    def __post_init__(self) -> None:
        check_choices(self, {"dtype": DTYPES})
