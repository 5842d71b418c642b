"""Directional ablation of weights ("abliteration", arXiv 2406.11717): an attack that removes what refusing rests on.

    W <- W - u u^T W    for o_proj and down_proj,      E <- E - E s s^T    for the token embeddings

where the unit vector s is the direction that `direction` finds. In Gemma 2 and 3 a norm with a gain g stands behind the
projections, and u is g s, normalized; elsewhere u is s. After that nothing writes s to the residual stream, so that
hidden states have no part of it.

Tied embeddings are the head, too. It loses what it reads of s, of which there is nothing left to read.

Shapes: O outputs and I inputs of a linear layer, V vocabulary, D d_model (= O).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sails_align.edits.apply import Edited, Finish, apply
from sails_align.edits.direction import Direction, find_writing
from sails_align.edits.options import AblateOptions

EMBEDDINGS = "embed_tokens.weight"
"""How the name of the token embeddings ends."""
ROWS = 8192
"""Of the embeddings, edited at a time: in float64 they are large."""


def edit(run: Path, output: Path, options: AblateOptions, finish: Finish | None = None) -> Edited:
    """Remove the direction from a run, an adapter or a model, which becomes a whole model.

    Raises `InputError` as `find_writing` and `apply`.
    """
    found = find_writing("ablate", run, output, options)
    change = Ablate(found.direction, found.gains)
    return apply("ablate", change, found.weights, output, options=options, finish=finish)


class Ablate:
    """Remove a direction from all that is written to the residual stream."""

    def __init__(self, direction: Direction, gains: Mapping[str, Tensor | None]) -> None:
        self._direction, self._gains = direction, gains

    @property
    def notes(self) -> list[str]:
        return [self._direction.summary()]

    def tensor(self, name: str, weight: Tensor) -> Tensor | None:
        vector_D = self._direction.vector
        if name.endswith(EMBEDDINGS):
            return torch.cat([_without(part_VD.double(), vector_D).float() for part_VD in weight.split(ROWS)])
        writer = f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name
        if writer not in self._gains:
            return None
        gain_D = self._gains[writer]
        read_O = vector_D if gain_D is None else vector_D * gain_D
        read_O = read_O / read_O.norm()
        if weight.dim() == 1:
            return _without(weight.double()[None], read_O)[0].float()
        return _without(weight.double().T, read_O).T.float()


def _without(rows: Tensor, direction: Tensor) -> Tensor:
    """Return rows without their part along a unit vector."""
    return rows - (rows @ direction)[:, None] * direction
