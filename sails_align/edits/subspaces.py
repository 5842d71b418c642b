"""Find the subspaces of a model's layers that its outputs on safe answers span (LSSF, arXiv 2602.00038, eqs. 4-11).

For each linear layer Z = W X, where the columns of X are the layer's inputs at the tokens of safe answers, each scaled
to unit norm. The subspace is that of the largest left singular vectors of Z.

Shapes: O outputs and I inputs of a linear layer, T tokens, R directions, K singular values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sails_align.core.errors import InputError
from sails_align.core.progress import progress_bar
from sails_align.edits.linears import Place
from sails_align.models.blocks import Batch, BlockByBlock
from sails_align.models.inputs import add_products


@dataclass(frozen=True)
class OutputSubspace:
    """Directions on the output side of a layer, each with a weight."""

    directions: Tensor
    """(O, R), orthonormal, float64."""
    weights: Tensor
    """(R,), a_i in eq. 10."""

    @property
    def rank(self) -> int:
        return len(self.weights)

    def on_cpu(self) -> "OutputSubspace":
        return OutputSubspace(self.directions.cpu(), self.weights.cpu())

    def project(self, delta_OI: Tensor) -> Tensor:
        """Return P' delta, with P' = sum of a_i^2 u_i u_i^T (eq. 11), in float64."""
        scaled_OR = self.directions * self.weights
        return scaled_OR @ (scaled_OR.T @ delta_OI.double())


def entropy_rank(values_K: Tensor, eta: float) -> int:
    """Return the fewest singular values (descending) that have a share `eta` of their entropy (eqs. 5-7)."""
    shares_K = values_K.double().square()
    shares_K = shares_K / shares_K.sum()
    sums_K = -torch.special.xlogy(shares_K, shares_K).cumsum(0)
    if not sums_K[-1] > 0:  # one direction has all the energy
        return 1
    return int((sums_K / sums_K[-1] < eta - 1e-12).sum()) + 1


def weights_of(values_R: Tensor, a_1: float) -> Tensor:
    """Return the weights (R,) of directions with these singular values: a_1 at the first, 1 at the last (eq. 10)."""
    first, last = values_R[0], values_R[-1]
    if not first > last:
        return torch.ones_like(values_R)
    return 1 + (a_1 - 1) * (values_R - last) / (first - last)


def subspace_of(gram_OO: Tensor, n_tokens: int, eta: float, a_1: float) -> OutputSubspace:
    """Return the subspace of outputs Z (O, T) by Z Z^T, float64."""
    squares, vectors = torch.linalg.eigh(gram_OO)  # ascending
    n = min(len(squares), n_tokens)
    values_K, vectors_OK = squares.flip(0)[:n].clamp(min=0).sqrt(), vectors.flip(1)[:, :n]
    rank = entropy_rank(values_K, eta)
    return OutputSubspace(vectors_OK[:, :rank].contiguous(), weights_of(values_K[:rank], a_1))


def find_subspaces(
    model: nn.Module, places: Mapping[str, Place], batches: Sequence[Batch], eta: float, a_1: float
) -> dict[str, OutputSubspace]:
    """Return the subspace of each named linear layer, on the CPU.

    Args:
        model: without an adapter.
        places: of the layers, by the names of their weights.
        batches: token sequences, with masks of the tokens that are looked at.
        eta: see `entropy_rank`.
        a_1: see `weights_of`.

    Raises:
        InputError: if the activations are not finite.
    """
    n_tokens = sum(int(mask_BS.sum()) for _, _, mask_BS in batches)
    runner, found = BlockByBlock(model, batches), {}
    with progress_bar(shown=True) as bar, torch.no_grad():
        task = bar.add_task("finding subspaces", total=runner.n_blocks)
        while runner.block <= max((place.block for place in places.values()), default=-1):
            grams: dict[str, Tensor] = {}
            named = {place.path: name for name, place in places.items() if place.block == runner.block}
            runner.advance(named, _adds_to(grams, {path: places[name].of(model) for path, name in named.items()}))
            for path, gram_OO in grams.items():
                if not gram_OO.isfinite().all():
                    raise InputError(f"the activations of {named[path]} are not finite; load the model in float32")
                found[named[path]] = subspace_of(gram_OO, n_tokens, eta, a_1).on_cpu()
            bar.advance(task)
    return found


def _adds_to(grams: dict[str, Tensor], layers: Mapping[str, nn.Linear]) -> Callable[[str, Tensor], None]:
    """Return what adds z z^T for the output of every input, scaled to unit norm, to the sum of its layer."""

    def add(path: str, inputs_TI: Tensor) -> None:
        add_products(grams, path, normalize(inputs_TI.float(), dim=1) @ layers[path].weight.float().T)

    return add
