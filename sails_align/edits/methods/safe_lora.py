"""Safe LoRA: project updates onto the directions of the alignment (arXiv 2405.16833).

    V = W_aligned - W_unaligned,    C = V V^T / |V|_F,    D <- C D    where cos(C D, D) <= threshold

for every matrix that training has changed by D. Where V = 0, there is no direction to project onto, and D stays. C is
the paper's fast variant: it is no projector, and scales what it keeps. In an adapter D = s B A, so lora_B <- C lora_B,
and the rank stays.

Shapes: O outputs and I inputs of a linear layer, R rank.
"""

from pathlib import Path

from torch import Tensor
from torch.linalg import multi_dot
from torch.nn.functional import cosine_similarity

from sails_align.edits.apply import Edited, Finish, apply, left_alone
from sails_align.edits.controls import Turn
from sails_align.edits.options import SafeLoraOptions
from sails_align.edits.weights import Update, WeightDifference, Weights, aligned_of, open_aligned, open_required


def edit(run: Path, output: Path, options: SafeLoraOptions, finish: Finish | None = None) -> Edited:
    """Project the updates of a run, an adapter or a model that was trained from an aligned one.

    Raises `InputError` as `open_aligned`, `open_required` and `apply`.
    """
    weights, aligned = open_aligned(run, options.base_model, options.aligned_model)
    unaligned = open_required(weights, "unaligned_model", options.unaligned_model)
    change = SafeLora(weights, aligned, unaligned, options)
    return apply("safe_lora", change, weights, output, options=options, finish=finish)


class SafeLora:
    """Project each update; `aligned` is None for an adapter on the aligned model."""

    def __init__(self, weights: Weights, aligned: Weights | None, unaligned: Weights, options: SafeLoraOptions) -> None:
        self._change = None if aligned is None else WeightDifference(weights, aligned)
        self._aligned, self._options = aligned, options
        self._vectors = WeightDifference(aligned_of(weights, aligned), unaligned)
        self.keeps_adapter = aligned is None
        self._n_updates = self._n_projected = self._n_without = 0
        self._stacks: list[str] = []

    @property
    def notes(self) -> list[str]:
        of = f"of {self._n_updates} updated matrices"
        without = (
            f"{self._n_without} {of} have no safety direction and keep their update: the alignment left them as is"
        )
        return [
            f"{self._n_projected} {of} are projected",
            *([without] if self._n_without else []),
            *left_alone(self._stacks),
        ]

    def tensor(self, name: str, weight: Tensor) -> Tensor | None:
        assert self._aligned is not None, "adapters on the aligned model are edited as such"
        assert self._change is not None, "as above"
        delta_OI = None if weight.dim() < 2 else self._change.of(name)
        if delta_OI is None:
            return None
        if weight.dim() > 2:
            self._stacks.append(name)
            return None
        projected_OI = self._projected(name, delta_OI, None)
        return None if projected_OI is None else self._aligned.get(name) + projected_OI

    def update(self, name: str, update: Update) -> Tensor | None:
        return self._projected(name, update.B_OR, update.A_RI)

    def _projected(self, name: str, columns: Tensor, A_RI: Tensor | None) -> Tensor | None:
        """Return C times columns of the output side, (O, I) or (O, R); None where the update stays.

        An update is the columns themselves, or the columns times `A_RI` if that is given.
        """
        self._n_updates += 1
        vector_OI = self._vectors.of(name)
        if vector_OI is None:
            self._n_without += 1
            return None

        def times_c(columns: Tensor) -> Tensor:
            return multi_dot([vector_OI, vector_OI.T, columns]) / vector_OI.norm()  # in the cheaper order

        projected = times_c(columns)
        one, other = (projected, columns) if A_RI is None else (projected @ A_RI, columns @ A_RI)
        if not cosine_similarity(one.flatten(), other.flatten(), dim=0) <= self._options.threshold:
            return None
        self._n_projected += 1
        seed = self._options.control_seed
        return projected if seed is None else Turn.around(times_c, columns, name, seed)
