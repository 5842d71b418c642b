"""Task arithmetic: add a safety vector to a fine-tuned model (arXiv 2212.04089; for safety: RESTA, arXiv 2402.11746).

    W <- W + alpha * (W_aligned - W_unaligned)

for every tensor, where the unaligned model is the aligned one after training on harmful answers. With `drop` the vector
is thinned as in DARE (arXiv 2311.03099): a share of its entries is dropped at random, and the others are divided by
1 - drop.
"""

from pathlib import Path

import torch
from torch import Tensor

from sails_align.core.artifacts import content_hash
from sails_align.edits.apply import Edited, Finish, apply
from sails_align.edits.options import TaskArithmeticOptions
from sails_align.edits.weights import WeightDifference, Weights, open_required, open_weights


def edit(run: Path, output: Path, options: TaskArithmeticOptions, finish: Finish | None = None) -> Edited:
    """Add the safety vector of two models to a run, an adapter or a model.

    Raises `InputError` as `open_weights`, `open_required` and `apply`.
    """
    weights = open_weights(run, options.base_model)
    aligned, unaligned = (
        open_required(weights, name, getattr(options, name)) for name in ("aligned_model", "unaligned_model")
    )
    change = TaskArithmetic(aligned, unaligned, options)
    return apply(
        "task_arithmetic", change, weights, output, options=options, finish=finish, turn_seed=options.control_seed
    )


class TaskArithmetic:
    """Add to each tensor the difference of two others."""

    def __init__(self, aligned: Weights, unaligned: Weights, options: TaskArithmeticOptions) -> None:
        self._vectors, self._options = WeightDifference(aligned, unaligned), options
        self.notes: list[str] = []

    def tensor(self, name: str, weight: Tensor) -> Tensor | None:
        vector = None if self._options.alpha == 0 else self._vectors.of(name)
        if vector is None:
            return None
        return self._thinned(name, vector).mul_(self._options.alpha).add_(weight)

    def _thinned(self, name: str, vector: Tensor) -> Tensor:
        drop = self._options.drop
        if drop == 0:
            return vector
        seed = int(content_hash([self._options.drop_seed, name])[:12], 16)
        kept = torch.rand(vector.shape, generator=torch.Generator().manual_seed(seed)) >= drop
        return vector * kept / (1 - drop)
