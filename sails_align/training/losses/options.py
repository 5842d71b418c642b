"""Options of the losses."""

from dataclasses import dataclass

from sails_align.core.options import check_least, option


@dataclass(frozen=True)
class LossOptions:
    """The loss of a training."""

    loss: str | None = option(None, "A loss built on TRL's: first_tokens. Default: TRL's own loss (see --loss_type).")


@dataclass(frozen=True)
class FirstTokensOptions:
    """Options of the loss `first_tokens`."""

    first_tokens: int = option(
        5, "Number of tokens at the beginning of each response that --loss first_tokens weights."
    )
    first_tokens_weight: float = option(3.0, "Weight of these tokens; the other tokens have weight 1.")

    def __post_init__(self) -> None:
        check_least(self, first_tokens=1, first_tokens_weight=0)
