"""Remove entries from a change of weights and make up for them with the others (IRR, arXiv 2412.11041).

    candidates   entries whose sign is not that of the safety vector
    removed      the candidates but for those with the lowest Fisher information, a share `sparsity` of them
    the others   move so that the layer's outputs change little (optimal brain surgeon)

Candidates are ranked within blocks of columns. With `official`, a block's removed entries are made up for one column
after the other, by entries to their right only; what is moved onto an entry that is removed later is lost, so that a
row can end up further from its outputs than without it. The next block is ranked as it then is. With `exact`, the rows'
kept entries take the values with the least error.

Shapes: O outputs and I inputs of a linear layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sails_align.edits.controls import generator_of, shuffled
from sails_align.edits.options import IrrOptions


@dataclass(frozen=True)
class Thinned:
    """A change of weights without the entries that work against safety."""

    delta: Tensor
    """(O, I), float64."""
    removed: Tensor
    """(O, I), bool."""


def mismatches(delta_OI: Tensor, vector_OI: Tensor, fisher_OI: Tensor | None, sparsity: float) -> Tensor:
    """Return which entries (O, I) of a block of columns are removed; `sparsity` is the share of candidates kept."""
    candidates_OI = delta_OI.sign() != vector_OI.sign()
    n_kept = int(sparsity * int(candidates_OI.sum()))
    if n_kept == 0:
        return candidates_OI
    assert fisher_OI is not None, "to keep some, they must be ranked"
    order = fisher_OI[candidates_OI].argsort(stable=True)
    is_removed = torch.ones_like(order, dtype=torch.bool)
    is_removed[order[:n_kept]] = False
    removed_OI = torch.zeros_like(candidates_OI)
    removed_OI[candidates_OI] = is_removed
    return removed_OI


def thin(
    delta_OI: Tensor,
    vector_OI: Tensor,
    fisher_OI: Tensor | None,
    gram_II: Tensor | None,
    options: IrrOptions,
    name: str = "",
) -> Thinned:
    """Remove entries of a change of weights, and recalibrate the others.

    Args:
        delta_OI: the change.
        vector_OI: the safety vector, aligned - unaligned.
        fisher_OI: of the aligned model; None if all candidates are removed.
        gram_II: sum over tokens of the outer products of the layer's inputs, at any scale; None without recalibration.
        options: `recalibrate`, `sparsity`, `blocksize`, `damping` and `control_seed`.
        name: of the layer; a control draws its entries by it.
    """
    delta_OI = delta_OI.double().clone()
    seed = options.control_seed
    generator = None if seed is None else generator_of(name, seed)

    def removed_in(part: slice) -> Tensor:
        fisher_OC = None if fisher_OI is None else fisher_OI[:, part]
        removed_OC = mismatches(delta_OI[:, part], vector_OI[:, part], fisher_OC, options.sparsity)
        return removed_OC if generator is None else shuffled(removed_OC, generator)

    parts = _blocks(delta_OI, options.blocksize)
    if options.recalibrate == "official":
        assert gram_II is not None, "recalibration needs inputs"
        return _official(delta_OI, gram_II.double(), options.damping, parts, removed_in)
    removed_OI = torch.cat([removed_in(part) for part in parts], dim=1)
    if options.recalibrate == "exact":
        assert gram_II is not None, "recalibration needs inputs"
        return Thinned(_exact(delta_OI, removed_OI, damped(gram_II.double(), options.damping)), removed_OI)
    return Thinned(delta_OI.masked_fill(removed_OI, 0), removed_OI)


def damped(gram_II: Tensor, damping: float) -> Tensor:
    """Return a sum of outer products (I, I) with a share of its mean diagonal added to the diagonal.

    Inputs that are always zero do not count in the mean, and get it as their own value, so that the sum can be
    inverted. (The authors give them 1, which is large or small depending on the scale of the other inputs.)
    """
    diagonal_I = gram_II.diagonal()
    is_zero_I = diagonal_I == 0
    mean = 1.0 if is_zero_I.all() else diagonal_I[~is_zero_I].mean().item()
    damped_II = gram_II.clone()
    damped_II.diagonal().add_(damping * mean + mean * is_zero_I.to(gram_II))
    return damped_II


def _official(
    delta_OI: Tensor, gram_II: Tensor, damping: float, parts: Sequence[slice], removed_in: Callable[[slice], Tensor]
) -> Thinned:
    delta_OI[:, gram_II.diagonal() == 0] = 0  # no output depends on them
    upper_II = _upper(damped(gram_II, damping))
    del gram_II  # of wide layers these matrices are the largest thing in memory
    removed_OI = torch.zeros_like(delta_OI, dtype=torch.bool)
    for part in parts:
        block_OC, upper_CC = delta_OI[:, part], upper_II[part, part]  # a view: what is removed here is removed there
        removed_OC = removed_in(part)  # of what the blocks before have left here
        errors_OC = torch.zeros_like(block_OC)
        for column in range(block_OC.shape[1]):
            kept_O = block_OC[:, column].masked_fill(removed_OC[:, column], 0)
            errors_OC[:, column] = (block_OC[:, column] - kept_O) / upper_CC[column, column]
            block_OC[:, column:] -= errors_OC[:, column, None] * upper_CC[column, column:]
            block_OC[:, column] = kept_O
        delta_OI[:, part.stop :] -= errors_OC @ upper_II[part, part.stop :]
        removed_OI[:, part] = removed_OC
    return Thinned(delta_OI, removed_OI)


def _upper(hessian_II: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian_II)), upper=True)


def _exact(delta_OI: Tensor, removed_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """Return the change without the removed entries that has the least damped error, row by row.

    Of a row d with removed entries r: d - H^-1[:, r] (H^-1[r, r])^-1 d[r].
    """
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    rows = []
    for delta_I, removed_I in zip(delta_OI, removed_OI, strict=True):
        inverse_IR = inverse_II[:, removed_I]
        if inverse_IR.shape[1] > 0:
            factor_RR = torch.linalg.cholesky(inverse_IR[removed_I])
            shares_R = torch.cholesky_solve(delta_I[removed_I, None], factor_RR).squeeze(1)
            delta_I = (delta_I - inverse_IR @ shares_R).masked_fill(removed_I, 0)
        rows.append(delta_I)
    return torch.stack(rows)


def _blocks(delta_OI: Tensor, blocksize: int) -> list[slice]:
    n = delta_OI.shape[1]
    return [slice(start, min(start + blocksize, n)) for start in range(0, n, blocksize)]
