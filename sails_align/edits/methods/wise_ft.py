"""WiSE-FT: go back from a fine-tuned model towards the one before (arXiv 2109.01903).

    W <- (1 - t) W_aligned + t W

for every tensor. It needs no data, and is the baseline that any repair of safety has to beat: at t = 0 all of the
safety is back, and none of what was learned.

If the model is an adapter on the aligned model, the result is the adapter with lora_B <- t lora_B.
"""

from pathlib import Path

from torch import Tensor

from sails_align.edits.apply import Edited, Finish, apply
from sails_align.edits.options import WiseFtOptions
from sails_align.edits.weights import Update, WeightDifference, Weights, open_aligned


def edit(run: Path, output: Path, options: WiseFtOptions, finish: Finish | None = None) -> Edited:
    """Average a run, an adapter or a model with the aligned model that it was trained from.

    Raises `InputError` as `open_aligned` and `apply`.
    """
    weights, aligned = open_aligned(run, options.base_model, options.aligned_model)
    change = WiseFt(weights, aligned, options.t)
    return apply("wise_ft", change, weights, output, options=options, finish=finish, turn_seed=options.control_seed)


class WiseFt:
    """Average each tensor with the aligned model's; `aligned` is None for an adapter on the aligned model."""

    def __init__(self, weights: Weights, aligned: Weights | None, t: float) -> None:
        self._change = None if aligned is None else WeightDifference(weights, aligned)
        self._aligned, self._t = aligned, t
        self.keeps_adapter = aligned is None
        self.notes: list[str] = []

    def tensor(self, name: str, weight: Tensor) -> Tensor | None:
        assert self._aligned is not None, "adapters on the aligned model are edited as such"
        assert self._change is not None, "as above"
        delta = None if self._t == 1 else self._change.of(name)
        if delta is None:
            return None
        aligned = self._aligned.get(name)
        return aligned if self._t == 0 else delta.mul_(self._t).add_(aligned)

    def update(self, name: str, update: Update) -> Tensor | None:
        return None if self._t == 1 else self._t * update.B_OR
