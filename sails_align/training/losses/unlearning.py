"""What losses share that unlearn harmful answers by SAE features: their texts, and the frozen model.

Shapes: T tokens, D d_model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from sails_align.core.errors import InputError
from sails_align.data.tokens import TokenizedSide, padded
from sails_align.models.hooks import at_tokens, states_up_to
from sails_align.saes.sets import SAESet
from sails_align.subspace.forward import discover
from sails_align.subspace.statistics import Fitter
from sails_align.training.dataset import TrainingSource
from sails_align.training.losses.side_batches import answers, harmful_pairs
from sails_align.training.plan import TrainingPlan
from sails_align.training.subspace import saes_of


@dataclass(frozen=True, eq=False)
class UnlearningData:
    """Texts with a mask of the answer's tokens, and the SAEs of the model."""

    forget: list[TokenizedSide]
    """Rejected responses to harmful requests."""
    retain: list[TokenizedSide]
    """Responses to harmless requests."""
    saes: SAESet

    @classmethod
    def of(cls, name: str, plan: TrainingPlan, source: TrainingSource) -> "UnlearningData":
        """Take the data of a training with the loss of that name; raise `InputError` if something is missing."""
        if "rejected" not in source.safety.column_names or source.helpful is None:
            lacking = "harmless requests" if source.helpful is None else "rejected responses, which are to be forgotten"
            raise InputError(
                f"loss is {name}, but the data has no {lacking};\n"
                "give preference data (--dataset_name) and harmless requests with answers (--helpful_dataset_name)"
            )
        if not (saes := saes_of(plan, source)):
            raise InputError(
                f"loss is {name}, which needs SAEs of {source.name}; give --sae_release and --sae_ids, or --sae_path"
            )
        length = plan.training.max_length or 1024
        forget = answers(source.tokenizer, harmful_pairs(source.safety, name), "rejected", length)
        return cls(forget, answers(source.tokenizer, source.helpful, "chosen", length), saes)

    def fit(self, model: nn.Module, fitter: Fitter, layers: Sequence[int]) -> None:
        """Feed the hidden states of both kinds of texts to a fitter, as sides of what it knows as prompts."""
        discover(model, {"prompt": {"aligned": self.retain, "unaligned": self.forget}}, [fitter], layers)


def answer_states(model: nn.Module, layers: Sequence[int], sides: Sequence[TokenizedSide]) -> dict[int, Tensor]:
    """Return the outputs (T, D) float32 of the given blocks at the answers' tokens."""
    ids_BS, attention_BS, mask_BS = padded(sides)
    hidden_states = states_up_to(model, layers, ids_BS, attention_BS)
    return {layer: at_tokens(hidden_BSD, mask_BS).float() for layer, hidden_BSD in hidden_states.items()}


@contextmanager
def frozen(model: PeftModel) -> Iterator[None]:
    """Turn the adapter, dropout and gradients off within the block."""
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter():
            yield
    finally:
        model.train()
