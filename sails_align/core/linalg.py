"""Linear algebra on subspaces of the residual stream.

Shapes: D d_model, R rank, K directions. A basis is (D, R) with orthonormal columns.
"""

import torch


def orthonormalize(directions_DK: torch.Tensor) -> torch.Tensor:
    """Return orthonormal columns (..., D, K) by QR, each with the sign of its column. K <= D, full rank assumed."""
    q_DK, r_KK = torch.linalg.qr(directions_DK)
    return q_DK * torch.where(r_KK.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q_DK.dtype).unsqueeze(-2)


def complete_basis(basis_DR: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Return the first `rank` (at most D) columns of a basis, completed by random orthonormal ones. (D, rank)

    The generator is one of the CPU, so that the result does not depend on the device.
    """
    d_model, given = basis_DR.shape
    if given >= rank:
        return basis_DR[:, :rank]
    if rank > d_model:
        raise ValueError(f"rank {rank} is larger than d_model {d_model}: there are not that many orthogonal directions")
    random_DK = torch.randn(d_model, rank - given, generator=generator, dtype=torch.float64).to(basis_DR.device)
    # QR of all columns, not of the random ones minus their projection: with little room left, that is mostly rounding.
    all_DR = orthonormalize(torch.cat([basis_DR.double(), random_DK], dim=1))
    return torch.cat([basis_DR, all_DR[:, given:].to(basis_DR)], dim=1)


def principal_angles(basis_a_DR: torch.Tensor, basis_b_DR: torch.Tensor) -> torch.Tensor:
    """Return the principal angles (radians, ascending) between two orthonormal bases. (..., min(R_a, R_b))"""
    cosines = torch.linalg.svdvals(basis_a_DR.mT.double() @ basis_b_DR.double())
    return torch.arccos(cosines.clamp(-1.0, 1.0))
