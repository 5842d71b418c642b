"""LoX: extrapolate the low-rank part of an alignment (arXiv 2506.15606).

    W <- W_aligned + alpha * SVD_k(W_aligned - W_base)

for every matrix, embeddings included; vectors such as the norms' gains stay, and so do tensors of more dimensions.
Training further then moves the model less far from being aligned. SVD_k(D) = U_k U_k^T D, so in an adapter, where
D = s B A, only lora_B changes: lora_B <- (I + alpha U_k U_k^T) lora_B, and the result is an adapter of the same rank.

Upstream (VITA-Group/LoX) subtracts and adds in bfloat16; here all of it is float32, and rounded once.

Shapes: O outputs and I inputs of a linear layer, R rank.
"""

from pathlib import Path

from torch import Tensor

from sails_align.core.errors import InputError
from sails_align.edits.apply import Edited, Finish, apply, left_alone
from sails_align.edits.low_rank import output_directions, truncated
from sails_align.edits.options import LoxOptions
from sails_align.edits.weights import Update, WeightDifference, Weights, check_same_shapes, open_weights


def edit(run: Path, output: Path, options: LoxOptions, finish: Finish | None = None) -> Edited:
    """Extrapolate the alignment of a run, an adapter, or a model whose base is given.

    Raises `InputError` as `open_weights` and `apply`; or if there is no base model, or it is of another shape.
    """
    weights, base = _opened(run, options.base_model)
    change = None if base is None else WeightDifference(weights, base)
    extrapolated = Lox(change, options)
    return apply("lox", extrapolated, weights, output, options=options, finish=finish, turn_seed=options.control_seed)


def _opened(run: Path, base_model: str | None) -> tuple[Weights, Weights | None]:
    """Return the aligned model, and its base if the aligned model is no adapter, which knows what it adds."""
    if (run / "adapter_config.json").is_file():
        return open_weights(run, base_model), None
    if base_model is None:
        raise InputError(f"{run} is no adapter, so its base model is not known; give it with --base_model")
    weights, base = open_weights(run), open_weights(base_model)
    check_same_shapes(weights, base)
    return weights, base


class Lox:
    """Add the largest directions of each change once more; `change` is None for an adapter, which is the change."""

    keeps_adapter = True

    def __init__(self, change: WeightDifference | None, options: LoxOptions) -> None:
        self._change, self._k, self._alpha = change, options.k, options.alpha
        self._ties: list[str] = []
        self._stacks: list[str] = []

    @property
    def notes(self) -> list[str]:
        return [*self._ties, *left_alone(self._stacks)]

    def tensor(self, name: str, weight: Tensor) -> Tensor | None:
        assert self._change is not None, "adapters are edited as such"
        if weight.dim() < 2 or self._alpha == 0:
            return None
        delta_OI = self._change.of(name)
        if delta_OI is None:
            return None
        if weight.dim() > 2:
            self._stacks.append(name)
            return None
        kept_OI, is_unique = truncated(delta_OI, self._k)
        self._warn(name, is_unique)
        return kept_OI.mul_(self._alpha).add_(weight)

    def update(self, name: str, update: Update) -> Tensor | None:
        rank = update.A_RI.shape[0]
        if self._alpha == 0:
            return None
        if self._k == 0 or self._k >= rank:
            return update.B_OR * (1 + self._alpha)
        directions_OK, is_unique = output_directions(update, self._k)
        self._warn(name, is_unique)
        B_OR = update.B_OR.double()
        return (B_OR + self._alpha * directions_OK @ (directions_OK.T @ B_OR)).float()

    def _warn(self, name: str, is_unique: bool) -> None:
        if not is_unique:
            self._ties.append(f"{name} has equal singular values at k = {self._k}: which of them is kept is arbitrary")
