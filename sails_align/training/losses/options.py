"""Options of the losses."""

from dataclasses import dataclass

from sails_align.core.errors import InputError
from sails_align.core.options import check_least, option


@dataclass(frozen=True)
class LossOptions:
    """The loss of a training."""

    loss: str | None = option(
        None, "A loss built on TRL's: first_tokens or constrained. Default: TRL's own loss (see --loss_type)."
    )


@dataclass(frozen=True)
class FirstTokensOptions:
    """Options of the loss `first_tokens`."""

    first_tokens: int = option(
        5, "Number of tokens at the beginning of each response that --loss first_tokens weights."
    )
    first_tokens_weight: float = option(3.0, "Weight of these tokens; the other tokens have weight 1.")

    def __post_init__(self) -> None:
        check_least(self, first_tokens=1, first_tokens_weight=0)


@dataclass(frozen=True)
class ConstrainedOptions:
    """Options of the loss `constrained`; the defaults are the paper's."""

    constrained_first_betas: list[float] = option(
        [0.5, 2.0, 2.0, 2.0, 2.0],
        "How strongly --loss constrained holds each of the first tokens of a response: 0 not at all, as plain SFT.",
    )
    constrained_beta: float = option(0.1, "Beta of --loss constrained for all other tokens of a response.")

    def __post_init__(self) -> None:
        check_least(self, constrained_beta=0)
        if not all(0 <= beta < float("inf") for beta in self.constrained_first_betas):
            raise InputError(f"constrained_first_betas is {self.constrained_first_betas}; choose numbers of 0 or more")
