"""Options of the data and of its transforms (`data/transforms`)."""

from dataclasses import dataclass

from sails_align.core.errors import InputError
from sails_align.core.options import check_choices, check_least, option
from sails_align.data.formats import NO_LABEL, Columns


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
    max_train_examples: int | None = option(
        None, "Maximum number of safety examples to train on, chosen by --seed. Default: all, on the testbed 512."
    )
    eval_examples: int = option(
        256,
        "Number of held-out pairs for the loss (taken from the training split if there is no test split); on the "
        "testbed, prompts of each test set.",
    )
    on_bad_rows: str = option(
        "error",
        "What to do with unusable rows: error (stop and report them) or skip (leave them out and count them).",
    )
    prompt_column: str | None = option(None, "Column of the prompts, if the data does not use a common name.")
    chosen_column: str | None = option(None, "As --prompt_column, for the responses to learn from.")
    rejected_column: str | None = option(None, "As --prompt_column, for the rejected responses.")
    label_column: str | None = option(
        None,
        "Column that says whether a response is good (is_safe, label and others are known), or none: all are good.",
    )
    good_labels: list[str] | None = option(None, "Values of the label column for good responses, such as true.")
    bad_responses: str = option(
        "drop",
        "Responses that are labelled bad: drop (left out and counted) or pair (rejected ones to good ones of the same "
        "prompt).",
    )
    helpful_prompt_column: str | None = option(None, "As --prompt_column, for the helpful dataset.")
    helpful_chosen_column: str | None = option(None, "As --chosen_column, for the helpful dataset.")
    helpful_label_column: str | None = option(None, "As --label_column, for the helpful dataset.")

    def __post_init__(self) -> None:
        check_choices(self, {"on_bad_rows": ("error", "skip"), "bad_responses": ("drop", "pair")})
        check_least(self, eval_examples=1, max_train_examples=1)
        if self.rejected_column is not None and self.chosen_column is None:
            raise InputError("rejected_column is given without chosen_column; give both")
        if self.good_labels is not None and (self.label_column or self.helpful_label_column) in (None, NO_LABEL):
            raise InputError("good_labels is given without label_column; give both")

    def columns(self, helpful: bool = False) -> Columns:
        """Return the columns named for the safety data, or for the helpful data."""
        good = None if self.good_labels is None else tuple(self.good_labels)
        if helpful:
            prompt, chosen = self.helpful_prompt_column, self.helpful_chosen_column
            return Columns(prompt, chosen, None, self.helpful_label_column, good, prefix="helpful_")
        return Columns(self.prompt_column, self.chosen_column, self.rejected_column, self.label_column, good)


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
class DertaOptions:
    """Options of the transform `derta`."""

    derta_prefix_share: float = option(
        0.0,
        "Share of safety pairs, chosen by --seed, whose refusal is learned after the first words of the rejected "
        "response (DeRTa: 1).",
    )
    derta_empty_share: float = option(
        1 / 3, "Share of the prefix examples without any words of the rejected response: plain refusals."
    )
    derta_rto_share: float = option(
        0.0,
        "Share of safety pairs with an additional RTO example: at every token of the rejected response, the first "
        "token of the refusal is learned (DeRTa: 1).",
    )
    derta_refusal: str | None = option(
        None,
        "How refusals begin. Its first token is what the examples of --derta_rto_share teach. Default: the token that "
        "all refusals begin with; needed if they begin with different ones.",
    )

    def __post_init__(self) -> None:
        for name in ("derta_prefix_share", "derta_empty_share", "derta_rto_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, but it is a share; choose a value from 0 to 1")
        if self.derta_refusal is not None and not self.derta_rto_share:
            raise InputError("derta_refusal is given without derta_rto_share, which alone uses it; leave it out")

    @property
    def used(self) -> str | None:
        """Return the name of an option with which the transform changes the data; None if it does not."""
        return next((name for name in ("derta_prefix_share", "derta_rto_share") if getattr(self, name)), None)


@dataclass(frozen=True)
class NearestRefusalOptions:
    """Options of the transform `nearest_refusal`."""

    nearest_refusal: bool = option(
        False,
        "Learn for each harmful request the refusal of a pool that is nearest to it by the base model's hidden states, "
        "in place of the refusal in the data.",
    )
    refusal_dataset_name: str | None = option(
        None, "Data set whose responses are the pool of --nearest_refusal. Default: the refusals of the safety data."
    )
    refusal_tokens: str = option(
        "last",
        "Hidden states by which --nearest_refusal compares texts: last (that of the last token of the chat template, "
        "where an answer would begin) or all (the mean over the tokens of the text).",
    )
    refusal_control_seed: int | None = option(
        None, "Make a control of --nearest_refusal: the same refusals, assigned to the requests at random by this seed."
    )

    def __post_init__(self) -> None:
        check_choices(self, {"refusal_tokens": ("all", "last")})
        check_least(self, refusal_control_seed=0)
        if not self.nearest_refusal and self.refusal_dataset_name is not None:
            raise InputError("refusal_dataset_name is given without nearest_refusal; add --nearest_refusal true")
        if not self.nearest_refusal and self.refusal_control_seed is not None:
            raise InputError("refusal_control_seed is given without nearest_refusal; add --nearest_refusal true")


@dataclass(frozen=True)
class CurriculumOptions:
    """Options of the transform `curriculum`."""

    refusal_stages: int | None = option(
        None,
        "Train on the safety examples of --nearest_refusal in this number of stages: first on those most similar to "
        "their refusals, in each stage on more, in the last one on all. Default: all, in one stage.",
    )

    def __post_init__(self) -> None:
        check_least(self, refusal_stages=1)


@dataclass(frozen=True)
class MixOptions:
    """Options of the transform `mix`."""

    helpful_ratio: float = option(1.0, "Number of helpful examples for each safety example.")

    def __post_init__(self) -> None:
        check_least(self, helpful_ratio=0)
