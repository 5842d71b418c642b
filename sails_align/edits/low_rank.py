"""The largest singular directions of a change of weights.

Shapes: O outputs and I inputs of a linear layer, R rank, K directions; L larger and S smaller of O and I, P rows of a
part.
"""

import torch
from torch import Tensor

from sails_align.edits.weights import PART, Update

TIE = 1e-6
"""Singular values closer than this share of the largest one count as equal."""


def truncated(delta_OI: Tensor, k: int) -> tuple[Tensor, bool]:
    """Return the best approximation of rank k, and whether it is unique (no equal singular values at the cut).

    By the eigenvectors of the smaller Gram matrix in float64, which for the matrices of a language model is much faster
    than their SVD. Copies in float64 are of a part at a time: embeddings are large. k = 0 or the full rank: the matrix
    itself.
    """
    n_outputs, n_inputs = delta_OI.shape
    if k == 0 or k >= min(n_outputs, n_inputs):
        return delta_OI, True
    kept_OI, n_rows = torch.empty_like(delta_OI), max(1, PART // min(n_outputs, n_inputs))
    is_tall = n_outputs > n_inputs
    tall_LS, kept_LS = (delta_OI, kept_OI) if is_tall else (delta_OI.T, kept_OI.T)
    gram_SS = torch.zeros([tall_LS.shape[1]] * 2, dtype=torch.float64)
    for part_PS in tall_LS.split(n_rows):
        exact_PS = part_PS.double()
        gram_SS += exact_PS.T @ exact_PS
    squares_S, vectors_SS = torch.linalg.eigh(gram_SS)  # ascending
    top_SK = vectors_SS[:, -k:]
    for part_PS, into_PS in zip(tall_LS.split(n_rows), kept_LS.split(n_rows), strict=True):
        into_PS.copy_((part_PS.double() @ top_SK) @ top_SK.T)
    values_S = squares_S.clamp(min=0).sqrt()
    return kept_OI, _is_gap(values_S[-k], values_S[-k - 1], values_S[-1])


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
