"""Options of the losses."""

from dataclasses import dataclass, field

from sails_align.core.errors import InputError


@dataclass(frozen=True)
class LossOptions:
    """The loss of a training."""

    loss: str | None = field(
        default=None,
        metadata={"help": "A loss built on TRL's: first_tokens. Default: TRL's own loss (see --loss_type)."},
    )


@dataclass(frozen=True)
class FirstTokensOptions:
    """Options of the loss `first_tokens`."""

    first_tokens: int = field(
        default=5,
        metadata={"help": "Number of tokens at the beginning of each response that --loss first_tokens weights."},
    )
    first_tokens_weight: float = field(
        default=3.0, metadata={"help": "Weight of these tokens; the other tokens have weight 1."}
    )

    def __post_init__(self) -> None:
        if self.first_tokens < 1:
            raise InputError(f"first_tokens is {self.first_tokens}; choose 1 or more")
        if not 0 <= self.first_tokens_weight < float("inf"):
            raise InputError(f"first_tokens_weight is {self.first_tokens_weight}; choose 0 or more")
