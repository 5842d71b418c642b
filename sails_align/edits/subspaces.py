"""Find the subspaces of a model's layers that its outputs on safe answers span (LSSF, arXiv 2602.00038, eqs. 4-11).

For each linear layer Z = W X, where the columns of X are the layer's inputs at the tokens of safe answers, each scaled
to unit norm. The subspace is that of the largest left singular vectors of Z.

Shapes: O outputs and I inputs of a linear layer, T tokens, R directions, K singular values.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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


class GatheredOutputs:
    """Gather the outputs Z (O, T) of a layer: themselves, or with more tokens than outputs the sum Z Z^T.

    Args:
        n_outputs: of the layer.
        n_tokens: that will be added.
    """

    def __init__(self, n_outputs: int, n_tokens: int) -> None:
        self._is_gram = n_tokens > n_outputs
        self._parts: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}

    def add(self, outputs_TO: Tensor) -> None:
        """Add the outputs of some tokens."""
        if self._is_gram:
            add_products(self._sums, "", outputs_TO)
        else:
            self._parts.append(outputs_TO)

    def subspace(self, eta: float, a_1: float) -> OutputSubspace | None:
        """Return their subspace; None if the outputs are not finite."""
        outputs_TO = None if self._is_gram else torch.cat(self._parts).double()
        gram = self._sums[""] if outputs_TO is None else outputs_TO @ outputs_TO.T
        if not gram.isfinite().all():
            return None
        squares, vectors = torch.linalg.eigh(gram)  # ascending
        values_K = squares.flip(0).clamp(min=0).sqrt()
        rank = entropy_rank(values_K, eta)
        vectors = vectors.flip(1)[:, :rank].contiguous()
        # QR, since the directions of small values are not orthogonal enough as they are.
        directions_OR = vectors if outputs_TO is None else torch.linalg.qr(outputs_TO.T @ vectors)[0]
        return OutputSubspace(directions_OR, weights_of(values_K[:rank], a_1))


def find_subspaces(
    model: nn.Module, places: Mapping[str, Place], batches: Sequence[Batch], eta: float, a_1: float
) -> Iterator[tuple[str, OutputSubspace]]:
    """Yield the subspace of each named linear layer, block by block; a layer may be changed once it was yielded.

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
    runner = BlockByBlock(model, batches)
    with progress_bar(shown=True) as bar, torch.no_grad():
        task = bar.add_task("finding subspaces", total=runner.n_blocks)
        while runner.block <= max((place.block for place in places.values()), default=-1):
            named = {place.path: name for name, place in places.items() if place.block == runner.block}
            layers = {path: places[name].of(model) for path, name in named.items()}
            outputs = {path: GatheredOutputs(layer.out_features, n_tokens) for path, layer in layers.items()}
            runner.advance(named, _adds_to(outputs, layers))
            for path, name in named.items():
                subspace = outputs.pop(path).subspace(eta, a_1)
                if subspace is None:
                    raise InputError(f"the activations of {name} are not finite; load the model in float32")
                yield name, subspace
            bar.advance(task)


def _adds_to(outputs: Mapping[str, GatheredOutputs], layers: Mapping[str, nn.Linear]) -> Callable[[str, Tensor], None]:
    """Return what adds the outputs of a layer for inputs that are scaled to unit norm."""

    def add(path: str, inputs_TI: Tensor) -> None:
        outputs[path].add(normalize(inputs_TI.float(), dim=1) @ layers[path].weight.float().T)

    return add
