"""Options of the edits of trained weights."""

from dataclasses import dataclass

from sails_align.core.errors import InputError
from sails_align.core.options import check_choices, check_least, check_positive, option

DTYPES = ("float32", "bfloat16", "float16")
MODELS = ("base_model", "aligned_model", "unaligned_model")
"""Options that name a model which decides the result."""
DATASETS = ("dataset_name", "helpful_dataset_name", "task_dataset_name")
"""Options that name data which decides the result."""
ROSI_VARIANTS = ("rosi", "projected")
RECALIBRATIONS = ("official", "exact", "none")


@dataclass(frozen=True)
class MergeOptions:
    """Options of the edit `merge`."""

    dtype: str | None = option(None, "Type of the merged weights. Default: the base model's.", choices=DTYPES)
    device: str | None = option(None, "Where to merge, such as cpu or cuda:1. Default: a GPU if there is one.")
    base_model: str | None = option(None, "The model it was trained on, if that is no longer where it was.")

    def __post_init__(self) -> None:
        check_choices(self, {"dtype": DTYPES})


_SAFETY_DATA = (
    "a dataset, or testbed or smollm2 for their own. Default: the safety data of the run, if it also had harmless "
    "data; otherwise what comes with its model."
)


@dataclass(frozen=True)
class EditOptions:
    """Options of all edits that change tensors one by one."""

    base_model: str | None = option(
        None, "The model that training started from. Default: the one that an adapter names."
    )
    device: str | None = option(None, "Where to compute, such as cpu or cuda:1. Default: a GPU if there is one.")
    control_seed: int | None = option(
        None,
        "Make a control: the same change with the coordinates of its outputs permuted and with random signs, drawn "
        "with this seed. Its size and rank stay the same.",
    )


@dataclass(frozen=True)
class RepairOptions(EditOptions):
    """Options of edits of a model that was trained further."""

    aligned_model: str | None = option(
        None,
        "The model before the further training. Default: the base model of an adapter, with the earlier adapter if it "
        "was trained with --adapter_path.",
    )


@dataclass(frozen=True)
class SafetyVectorOptions(RepairOptions):
    """Options of edits that use the difference of an aligned and an unaligned model."""

    unaligned_model: str | None = option(None, "The aligned model after training on harmful answers. Required.")


@dataclass(frozen=True)
class LoxOptions(EditOptions):
    """Options of the edit `lox`."""

    k: int = option(6, "Singular directions of each change to extrapolate. 0: all of them.")
    alpha: float = option(1.25, "How much of them to add. 0: nothing changes.")

    def __post_init__(self) -> None:
        check_least(self, k=0)
        if not abs(self.alpha) < float("inf"):
            raise InputError(f"alpha is {self.alpha}; choose a finite number")


@dataclass(frozen=True)
class WiseFtOptions(RepairOptions):
    """Options of the edit `wise_ft`."""

    t: float = option(0.5, "Weight of the model that is edited; the aligned model has 1 - t.")

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise InputError(f"t is {self.t}; choose a number from 0 (the aligned model) to 1 (the model as it is)")


@dataclass(frozen=True)
class TaskArithmeticOptions(SafetyVectorOptions):
    """Options of the edit `task_arithmetic`."""

    aligned_model: str | None = option(None, "The aligned model. Required.")
    alpha: float = option(0.5, "How much of the difference aligned - unaligned to add.")
    drop: float = option(0.0, "Share of the difference's entries to drop at random; the rest is rescaled (DARE).")
    drop_seed: int = option(0, "Seed that decides which entries --drop drops.")

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise InputError(f"drop is {self.drop}; choose a share of at least 0 and below 1")


@dataclass(frozen=True)
class SafeLoraOptions(RepairOptions):
    """Options of the edit `safe_lora`."""

    unaligned_model: str | None = option(
        None, "For this edit: the model before the alignment, such as the base model. Required."
    )
    threshold: float = option(
        0.35, "Project an update if its cosine with its projection is at most this. 1: all of them."
    )
    control_seed: int | None = option(
        None,
        "Make a control: the same updates are projected, but onto random directions, drawn with this seed: C with its "
        "coordinates permuted and with random signs.",
    )

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise InputError(f"threshold is {self.threshold}; choose a cosine, from -1 to 1")


@dataclass(frozen=True)
class RequestOptions(EditOptions):
    """Options of edits that look at harmful requests."""

    dataset_name: str | None = option(None, f"Harmful requests with refusals: {_SAFETY_DATA}")
    n_prompts: int = option(128, "Requests of each dataset to look at, at most.")
    data_seed: int = option(0, "Seed of the choice of requests.")
    max_length: int = option(512, "Tokens of a request with its response that are read, at most.")

    def __post_init__(self) -> None:
        check_least(self, n_prompts=1, max_length=1)


@dataclass(frozen=True)
class ContrastOptions(RequestOptions):
    """Options of what is found from the difference of harmful and harmless requests."""

    dataset_name: str | None = option(None, f"Harmful requests: {_SAFETY_DATA}")
    helpful_dataset_name: str | None = option(
        None, "Harmless requests: a dataset, or testbed or smollm2 for their own. Default: as for --dataset_name."
    )
    layer: int | None = option(
        None, "Layer whose direction is used. Default: the one that separates validation prompts best."
    )


@dataclass(frozen=True)
class DirectionOptions(ContrastOptions):
    """Options of edits that find the direction between harmful and harmless requests."""

    control_seed: int | None = option(
        None, "Make a control: a random direction, drawn with this seed, in place of the refusal direction."
    )
    system_prompt: str | None = option(
        None, "System prompt while the direction is found, such as one that asks an uncensored model to be safe."
    )


@dataclass(frozen=True)
class AblateOptions(DirectionOptions):
    """Options of the edit `ablate`."""


@dataclass(frozen=True)
class RosiOptions(DirectionOptions):
    """Options of the edit `rosi`."""

    rho: float = option(0.02, "Size of the change as a share of each matrix (Frobenius norm). 0: nothing changes.")
    variant: str = option(
        "rosi", "rosi (the paper's) or projected (amplify the direction in the outputs).", choices=ROSI_VARIANTS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"variant": ROSI_VARIANTS})
        check_least(self, rho=0)


@dataclass(frozen=True)
class LssfOptions(RequestOptions, SafetyVectorOptions):
    """Options of the edit `lssf`."""

    eta: float = option(0.85, "Share of the entropy of a layer's singular values that the safety subspace keeps.")
    alpha: float = option(1.0, "How much of the projected difference aligned - unaligned to add. 0: nothing changes.")
    a_1: float = option(1.0, "Weight of the first direction; it falls to 1 at the last one. 1: a plain projector.")
    control_seed: int | None = option(
        None, "Make a control: random subspaces, drawn with this seed, with the same ranks and weights."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.eta <= 1:
            raise InputError(f"eta is {self.eta}; choose a share above 0, and at most 1")
        for name in ("alpha", "a_1"):
            if not abs(getattr(self, name)) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; choose a finite number")


@dataclass(frozen=True)
class IrrOptions(RequestOptions, SafetyVectorOptions):
    """Options of the edit `irr`."""

    task_dataset_name: str | None = option(
        None,
        "Requests and responses of the further training's task, for the recalibration. Default: what the run was "
        "trained on, or harmless requests that come with its model.",
    )
    n_texts: int = option(256, "Maximum number of texts of the task.")
    sparsity: float = option(
        0.0,
        "Share of the entries against the safety vector that is kept: those with the lowest Fisher information of the "
        "aligned model on refusals. 1: nothing changes.",
    )
    recalibrate: str = option(
        "official",
        "How the other entries make up for what is removed: official (column by column, as in the authors' code), "
        "exact (least squares for each row, slow) or none.",
        choices=RECALIBRATIONS,
    )
    blocksize: int = option(128, "Columns in which entries are ranked together.")
    damping: float = option(0.01, "Added to the diagonal of the inputs' second moment, as a share of its mean.")
    control_seed: int | None = option(
        None, "Make a control: as many entries are removed, but random ones of the same columns, drawn with this seed."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"recalibrate": RECALIBRATIONS})
        check_least(self, n_texts=1, blocksize=1)
        check_positive(self, "damping")
        if not 0 <= self.sparsity <= 1:
            raise InputError(f"sparsity is {self.sparsity}; choose a share from 0 (all are removed) to 1 (none)")
