"""Safe LoRA: project updates onto the directions of the alignment (arXiv 2405.16833).

    V = W_aligned - W_unaligned,    C = V V^T / |V|_F,    D <- C D    where cos(C D, D) <= threshold

for every matrix that training has changed by D. C is the paper's fast variant: it is no projector, and scales what it
keeps. In an adapter D = s B A, so lora_B <- C lora_B, and the rank stays.

Shapes: O outputs and I inputs of a linear layer, R rank.
"""

from pathlib import Path

from torch import Tensor
from torch.nn.functional import cosine_similarity

from sails_align.edits.apply import Edited, Finish, apply
from sails_align.edits.options import SafeLoraOptions
from sails_align.edits.weights import Update, WeightDifference, Weights, aligned_of, open_aligned, open_required


def edit(run: Path, output: Path, options: SafeLoraOptions, finish: Finish | None = None) -> Edited:
    """Project the updates of a run, an adapter or a model that was trained from an aligned one.

    Raises `InputError` as `open_aligned`, `open_required` and `apply`.
    """
    weights, aligned = open_aligned(run, options.base_model, options.aligned_model)
    unaligned = open_required(weights, "unaligned_model", options.unaligned_model)
    change = SafeLora(weights, aligned, unaligned, options.threshold)
    return apply("safe_lora", change, weights, output, options=options, finish=finish)


class SafeLora:
    """Project each update; `aligned` is None for an adapter on the aligned model."""

    def __init__(self, weights: Weights, aligned: Weights | None, unaligned: Weights, threshold: float) -> None:
        self._change = None if aligned is None else WeightDifference(weights, aligned)
        self._aligned, self._threshold = aligned, threshold
        self._vectors = WeightDifference(aligned_of(weights, aligned), unaligned)
        self.keeps_adapter = aligned is None
        self.notes: list[str] = []

    def tensor(self, name: str, weight: Tensor) -> Tensor | None:
        assert self._aligned is not None, "adapters on the aligned model are edited as such"
        assert self._change is not None, "as above"
        if weight.dim() != 2:
            return None
        delta_OI = self._change.of(name)
        projected_OI = None if delta_OI is None else self._projected(name, delta_OI)
        if delta_OI is None or projected_OI is None or not self._is_far(projected_OI, delta_OI):
            return None
        return self._aligned.get(name) + projected_OI

    def update(self, name: str, update: Update) -> Tensor | None:
        projected_OR = self._projected(name, update.B_OR)
        if projected_OR is None:
            return None
        is_far = self._is_far(projected_OR @ update.A_RI, update.B_OR @ update.A_RI)
        return projected_OR if is_far else None

    def _projected(self, name: str, columns: Tensor) -> Tensor | None:
        """Return C times columns of the output side; None where the alignment changed nothing, so that C is no map."""
        vector_OI = self._vectors.of(name)
        return None if vector_OI is None else vector_OI @ (vector_OI.T @ columns) / vector_OI.norm()

    def _is_far(self, projected: Tensor, delta: Tensor) -> bool:
        return bool(cosine_similarity(projected.flatten(), delta.flatten(), dim=0) <= self._threshold)
