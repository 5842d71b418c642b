"""Options of the losses."""

from dataclasses import dataclass

from sails_align.core.errors import InputError
from sails_align.core.options import check_choices, check_least, check_positive, option


@dataclass(frozen=True)
class LossOptions:
    """The loss of a training."""

    loss: str | None = option(
        None,
        "A loss built on TRL's: first_tokens, constrained, redundancy, redirection, sspu or crisp. "
        "Default: TRL's own loss (see --loss_type).",
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
        "Beta of --loss constrained for each of the first tokens of a response; larger: less change; 0: plain SFT.",
    )
    constrained_beta: float = option(0.1, "Beta of --loss constrained for all other tokens of a response.")

    def __post_init__(self) -> None:
        check_least(self, constrained_beta=0)
        if not all(0 <= beta < float("inf") for beta in self.constrained_first_betas):
            raise InputError(f"constrained_first_betas is {self.constrained_first_betas}; choose numbers of 0 or more")


@dataclass(frozen=True)
class RedundancyOptions:
    """Options of the loss `redundancy`."""

    redundancy_weight: float = option(
        0.1, "Size of the penalty of --loss redundancy, as a share of TRL's loss; 0: no penalty."
    )
    redundancy_groups: int = option(
        2, "Number of groups that the rows of each lora_A are split into by --loss redundancy, from 2 to the rank."
    )
    redundancy_form: str = option(
        "features",
        "What --loss redundancy compares: features, what the groups compute of a batch's tokens, or weights, the "
        "groups alone, which is cheaper.",
    )

    def __post_init__(self) -> None:
        check_choices(self, {"redundancy_form": ("features", "weights")})
        check_least(self, redundancy_weight=0, redundancy_groups=2)


@dataclass(frozen=True)
class RedirectionOptions:
    """Options of the loss `redirection`."""

    redirection_weight: float = option(1.0, "Weight of --loss redirection relative to TRL's loss; 0: TRL's loss alone.")
    redirection_layer: int | None = option(
        None, "Block whose output --loss redirection uses, from 0. Default: the middle one."
    )
    redirection_control_seed: int | None = option(
        None,
        "Make a control of --loss redirection: the nearest refusals are dealt to the harmful answers at random.",
    )

    def __post_init__(self) -> None:
        check_least(self, redirection_weight=0, redirection_layer=0, redirection_control_seed=0)


@dataclass(frozen=True)
class SspuOptions:
    """Options of the loss `sspu`."""

    sspu_features: int = option(
        32, "Number of SAE features that --loss sspu takes as relevant to harmful answers, and as irrelevant ones."
    )
    sspu_layer: int | None = option(
        None,
        "Layer of the SAE whose features --loss sspu uses. Default: the one that tells harmful answers from harmless "
        "ones best.",
    )
    sspu_scale: float = option(
        1.0, "Norm of the vector that --loss sspu moves harmful answers to, over the norm of their hidden states."
    )
    sspu_retain_weight: float = option(100.0, "Weight of the term of --loss sspu that keeps harmless answers.")
    sspu_vector: str = option(
        "run", "How often --loss sspu draws its random vector: once for the run, or a new one in each step."
    )
    sspu_lambda: float | None = option(
        None,
        "Weight of the penalty of --loss sspu on updates outside of the relevant features' span; 0: none. Default: "
        "what is outside is removed after each step.",
    )
    sspu_control_seed: int | None = option(
        None, "Make a control of --loss sspu: both kinds of features are drawn from all active ones with this seed."
    )

    def __post_init__(self) -> None:
        check_choices(self, {"sspu_vector": ("run", "step")})
        check_least(self, sspu_features=1, sspu_layer=0, sspu_retain_weight=0, sspu_lambda=0, sspu_control_seed=0)
        check_positive(self, "sspu_scale")


@dataclass(frozen=True)
class CrispOptions:
    """Options of the loss `crisp`."""

    crisp_features: int = option(
        10, "Number of SAE features in each layer that --loss crisp suppresses in harmful answers, at most."
    )
    crisp_ratio: float = option(
        3.0, "How many times more active --loss crisp wants a feature to be in harmful answers than in harmless ones."
    )
    crisp_retain_weight: float = option(
        10.0, "Weight of the term of --loss crisp that keeps hidden states of harmless answers."
    )
    crisp_control_seed: int | None = option(
        None,
        "Make a control of --loss crisp: as many features, drawn with this seed from all that are active in harmful "
        "answers.",
    )

    def __post_init__(self) -> None:
        check_least(self, crisp_features=1, crisp_ratio=1, crisp_retain_weight=0, crisp_control_seed=0)
