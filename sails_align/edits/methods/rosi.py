"""ROSI: write the direction of refusal wherever a model writes to its residual stream (arXiv 2508.20766).

    W <- W + alpha s wbar^T,    wbar = mean of the rows of W

for the output projections of attention and of the MLP (o_proj, down_proj), where the unit vector s is the mean hidden
state of harmful prompts minus that of harmless ones, at the last token of the prompt. The output y becomes
y + alpha mean(y) s: the push depends on the mean of the output's coordinates, and not on the harm in the prompt. With
the variant `projected`, wbar = W^T s and the output becomes y + alpha (s . y) s: what the output has of the direction
is amplified, the reverse of directional ablation. That variant is not the paper's.

The paper gives neither alpha nor the layer of s. Here the layer is the one whose direction separates further prompts
best, and alpha is |change| = rho |W| (Frobenius), so that each matrix changes by the same share.

In Gemma 2 and 3 a norm with a gain g stands behind these projections. There s / g is written, so that s arrives, and
`projected` reads with g s.

Shapes: O outputs and I inputs of a linear layer, D d_model (= O), N prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sails_align.edits.apply import Edited, Finish, apply
from sails_align.edits.direction import Direction, find_writing
from sails_align.edits.options import RosiOptions
from sails_align.models.norms import floored_gain

CENTRED = 1e-6
"""Share of a matrix's norm below which its mean row is rounding: its outputs are centred, and nothing is pushed."""


@dataclass(frozen=True)
class Vectors:
    """What is written to the output side of a matrix, and what reads from it."""

    written: Tensor
    """(O,), unit norm."""
    read: Tensor | None
    """(O,), weights of the rows; None: their mean."""


def edit(run: Path, output: Path, options: RosiOptions, finish: Finish | None = None) -> Edited:
    """Write the direction of refusal into a run, an adapter or a model, which becomes a whole model.

    Raises `InputError` as `find_writing` and `apply`.
    """
    found = find_writing("rosi", run, output, options)
    vectors = {
        name: vectors_of(found.direction.vector, gain_D, options.variant) for name, gain_D in found.gains.items()
    }
    change = Rosi(vectors, options.rho, found.direction)
    return apply("rosi", change, found.weights, output, options=options, finish=finish)


def vectors_of(direction_D: Tensor, gain_D: Tensor | None, variant: str) -> Vectors:
    """Return what writes and reads a unit direction of the residual stream before a norm with a gain, if any."""
    written_O, read_O = direction_D, direction_D
    if gain_D is not None:
        written_O, read_O = direction_D / floored_gain(gain_D), direction_D * gain_D
    return Vectors(written_O / written_O.norm(), read_O / read_O.norm() if variant == "projected" else None)


def rank_one(weight_OI: Tensor, vectors: Vectors, rho: float) -> tuple[Tensor, float]:
    """Return the change (O, I) of a matrix, whose norm is `rho` times the matrix's, and its alpha.

    Nothing is changed, with alpha 0, where the rows' mean (or what is read) is zero.
    """
    written_O = vectors.written.to(weight_OI)
    row_I = weight_OI.mean(0) if vectors.read is None else vectors.read.to(weight_OI) @ weight_OI
    whole, size = weight_OI.norm().item(), row_I.norm().item()
    alpha = 0.0 if size <= CENTRED * whole else rho * whole / size
    return alpha * written_O[:, None] * row_I[None], alpha


class Rosi:
    """Add a matrix of rank one to each matrix that writes."""

    def __init__(self, vectors: Mapping[str, Vectors], rho: float, direction: Direction) -> None:
        self._vectors, self._rho, self._direction = vectors, rho, direction
        self._alphas: dict[str, float] = {}

    @property
    def notes(self) -> list[str]:
        centred = [name for name, alpha in self._alphas.items() if alpha == 0]
        alphas = sorted(alpha for alpha in self._alphas.values() if alpha > 0)
        return [
            self._direction.summary(),
            *([f"alpha is {alphas[0]:.3g} to {alphas[-1]:.3g}"] if alphas else []),
            *([f"{name} is unchanged: the mean of its rows is zero" for name in centred]),
        ]

    def tensor(self, name: str, weight: Tensor) -> Tensor | None:
        if name not in self._vectors or self._rho == 0:
            return None
        change_OI, self._alphas[name] = rank_one(weight.double(), self._vectors[name], self._rho)
        return (weight.double() + change_OI).float() if self._alphas[name] else None
