"""The largest singular directions of a change of weights.

Shapes: O outputs and I inputs of a linear layer, R rank, K directions.
"""

import torch
from torch import Tensor

from sails_align.edits.weights import Update

TIE = 1e-6
"""Singular values closer than this share of the largest one count as equal."""


def truncated(delta_OI: Tensor, k: int) -> tuple[Tensor, bool]:
    """Return the best approximation of rank k, and whether it is unique (no equal singular values at the cut).

    By the eigenvectors of the smaller Gram matrix in float64, which for the wide matrices of a language model is much
    faster than their SVD. k = 0 or the full rank: the matrix itself.
    """
    n_outputs, n_inputs = delta_OI.shape
    if k == 0 or k >= min(n_outputs, n_inputs):
        return delta_OI, True
    exact_OI = delta_OI.double()
    is_wide = n_outputs <= n_inputs
    gram = exact_OI @ exact_OI.T if is_wide else exact_OI.T @ exact_OI
    squares, vectors = torch.linalg.eigh(gram)  # ascending
    top = vectors[:, -k:]
    kept_OI = top @ (top.T @ exact_OI) if is_wide else (exact_OI @ top) @ top.T
    values = squares.clamp(min=0).sqrt()
    return kept_OI.to(delta_OI.dtype), _is_gap(values[-k], values[-k - 1], values[-1])


def output_directions(update: Update, k: int) -> tuple[Tensor, bool]:
    """Return the k largest left singular vectors (O, K) of an adapter's update, and whether they are unique.

    From the QR of both factors and the SVD of an (R, R) matrix; float64.
    """
    q_OR, r_RR = torch.linalg.qr(update.B_OR.double())
    _, right_RR = torch.linalg.qr(update.A_RI.double().T)
    left_RR, values_R, _ = torch.linalg.svd(r_RR @ right_RR.T)
    is_unique = k >= len(values_R) or _is_gap(values_R[k - 1], values_R[k], values_R[0])
    return q_OR @ left_RR[:, :k], is_unique


def _is_gap(last_kept: Tensor, first_dropped: Tensor, largest: Tensor) -> bool:
    """Return whether two singular values differ; both zero counts as a gap, since neither adds anything."""
    return bool(last_kept - first_dropped > TIE * largest) or bool(last_kept <= TIE * largest)
