"""Redirect what harmful answers are to the model, towards the nearest refusal.

SafeR-CLIP (arXiv 2511.16743) redirects the embedding of an unsafe image from its caption to the nearest safe caption:

    log(1 + exp(cos(h, c_unsafe) - cos(h, c_safe)))

with frozen targets c. For a language model, which is ours: h is the mean hidden state of a layer over the tokens of a
harmful answer (the rejected response to a harmful request), c_unsafe is the same in the model that training starts
from, and c_safe is the mean hidden state, in that model, of the refusal that is nearest to it. The refusals are the
chosen responses that the rules judge calls refusals (`data.refusals`). A text's loss depends on no other text of the
batch. The mean over texts, times a weight, is added to TRL's loss.

All hidden states of a language model have a large part in common, so that their cosines are near 1 and the loss would
hardly change. So h and c are taken without it: without the mean of the average harmful answer and the average refusal.
Which refusal is nearest is decided as in `data.transforms.nearest_refusal`: each side without its own mean.

Shapes: B batch, N texts, M refusals, D d_model.
"""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, softplus
from trl import DPOConfig, SFTConfig

from sails_align.core.errors import InputError
from sails_align.data.refusals import refusals_among
from sails_align.data.tokens import TokenizedSide, padded
from sails_align.evaluation.judges.rules import is_plain_refusal
from sails_align.initializers.examples import N_EXAMPLES
from sails_align.models.hooks import check_layers, states_up_to
from sails_align.training.dataset import TrainingSource
from sails_align.training.losses.compose import LossStep, check_not_compiled
from sails_align.training.losses.options import RedirectionOptions
from sails_align.training.losses.side_batches import (
    SideBatches,
    answers,
    frozen_mean_states,
    harmful_pairs,
    mean_states,
)
from sails_align.training.plan import TrainingPlan


class Redirection:
    """TRL's loss, and the redirection of harmful answers to the nearest refusal."""

    def __init__(self, options: RedirectionOptions, training: SFTConfig | DPOConfig) -> None:
        """Take the options; raise `InputError` with torch_compile, which does not run hooks."""
        check_not_compiled("redirection", training)
        self._options = options
        self._texts: list[TokenizedSide] = []
        self._unsafe_ND = self._safe_ND = self._shared_D = torch.empty(0)
        self._layer = 0

    def prepare(self, trainer: Any, plan: TrainingPlan, source: TrainingSource) -> None:
        """Compute the targets; raise `InputError` without harmful answers or refusals, or if the layer is none."""
        if "rejected" not in source.safety.column_names:
            raise InputError(
                "loss is redirection, which reads harmful answers, but the data has no rejected responses;\n"
                "give preference data (or labelled rows with --bad_responses pair), or leave the loss out"
            )
        wanted, blocks = self._options.redirection_layer, check_layers(trainer.model, [])
        self._layer = len(blocks) // 2 if wanted is None else wanted
        check_layers(trainer.model, [self._layer])
        length = plan.training.max_length or 1024
        pairs = harmful_pairs(source.safety, "redirection")
        pairs = pairs.select(range(min(N_EXAMPLES, len(pairs))))
        self._texts = answers(source.tokenizer, pairs, "rejected", length)
        refusals = answers(source.tokenizer, pairs.select(_refusals(pairs)), "chosen", length)
        unsafe_ND, safe_MD = (
            frozen_mean_states(trainer.model, self._layer, sides) for sides in (self._texts, refusals)
        )
        targets_N = nearest(unsafe_ND - unsafe_ND.mean(0), safe_MD - safe_MD.mean(0))
        if (seed := self._options.redirection_control_seed) is not None:
            targets_N = targets_N[torch.randperm(len(targets_N), generator=torch.Generator().manual_seed(seed))]
        self._shared_D = (unsafe_ND.mean(0) + safe_MD.mean(0)) / 2
        self._unsafe_ND, self._safe_ND = unsafe_ND - self._shared_D, safe_MD[targets_N] - self._shared_D
        self._batches = SideBatches(len(self._texts), trainer.args.per_device_train_batch_size, trainer.args.seed)

    def begin(self, trainer: Any) -> None:
        """Do nothing."""

    def __call__(self, step: LossStep) -> Tensor:
        """Return TRL's loss with the redirection's, and log the latter."""
        if self._options.redirection_weight == 0:
            return step.loss
        chosen = self._batches.indices(self._batches.turn(step.trainer))
        ids_BS, attention_BS, mask_BS = padded([self._texts[i] for i in chosen])
        model = step.trainer.accelerator.unwrap_model(step.model)
        hidden_BSD = states_up_to(model, [self._layer], ids_BS, attention_BS)[self._layer]
        h_BD = mean_states(hidden_BSD, mask_BS) - self._shared_D.to(hidden_BSD.device)
        mean = redirection(h_BD, *(c_ND[chosen].to(h_BD.device) for c_ND in (self._unsafe_ND, self._safe_ND))).mean()
        step.log("redirection", mean)
        return step.loss + self._options.redirection_weight * step.batch_share * mean.to(step.loss.device)


def _refusals(pairs: Dataset) -> list[int]:
    """Return the numbers of the pairs whose chosen response refuses; raise `InputError` if none does."""
    remedy = (
        "give data whose chosen responses refuse, or refusals with --nearest_refusal true --refusal_dataset_name FILE"
    )
    return refusals_among(
        pairs["chosen"][:], is_plain_refusal, source="the safety data", user="--loss redirection", remedy=remedy
    )


def redirection(h_BD: Tensor, unsafe_BD: Tensor, safe_BD: Tensor) -> Tensor:
    """Return the loss of each row, from 0.127 (at the safe target) to 2.127; ln 2 halfway. (B,)"""
    return softplus(cosine_similarity(h_BD, unsafe_BD, dim=1) - cosine_similarity(h_BD, safe_BD, dim=1))


def nearest(unsafe_ND: Tensor, safe_MD: Tensor) -> Tensor:
    """Return the safe row with the largest cosine for each unsafe one; of equal ones, the first. (N,)"""
    return (normalize(unsafe_ND, dim=1) @ normalize(safe_MD, dim=1).T).argmax(dim=1)
