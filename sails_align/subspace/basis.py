"""From chosen features to a subspace of the residual stream, one orthonormal basis for each layer that has an SAE.

Decoder directions of the chosen features -> (weighted) PCA keeping a share tau of the variance -> QR
(SAILS, arXiv 2512.23260).

Shapes: D d_model, F d_sae, K chosen features, R directions kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from sails_align.artifacts import load_artifact, save_artifact
from sails_align.errors import InputError
from sails_align.linalg import orthonormalize
from sails_align.subspace.features import FeatureSelection, LayerSelection

KIND = "subspace"
ORTHONORMAL_TOLERANCE = 1e-4  # float32 rounding over some thousand dimensions stays well under it


@dataclass(frozen=True, eq=False)
class Subspace:
    """Directions of the residual stream at the output of some blocks."""

    bases: dict[int, torch.Tensor]
    "layer -> basis_DR float32 with orthonormal columns, most important first."
    singular_values: dict[int, torch.Tensor]
    "layer -> (R,), what the columns were ranked by."
    provenance: dict[str, Any]
    "JSON-able: how it came about."

    def __post_init__(self) -> None:
        assert self.bases.keys() == self.singular_values.keys(), "every basis has its singular values"
        if not self.bases:
            raise InputError("a subspace needs at least one layer, and none was given")
        widths = {layer: basis_DR.shape[0] for layer, basis_DR in self.bases.items()}
        if len(set(widths.values())) > 1:
            raise InputError(f"the layers of a subspace differ in d_model ({widths}); they must be of one model")
        # One memory order (column-major, as QR gives it): products round differently in another one, and a training
        # from a loaded subspace would not repeat the one from the same subspace fresh from discovery.
        in_order = {layer: basis_DR.T.contiguous().T for layer, basis_DR in self.bases.items()}
        object.__setattr__(self, "bases", in_order)

    @property
    def d_model(self) -> int:
        return next(iter(self.bases.values())).shape[0]

    def save(self, folder: Path, input_hash: str) -> None:
        """Write `subspace.safetensors` and `subspace.json` into a folder (see `artifacts`)."""
        tensors = {f"basis.{layer}": basis_DR for layer, basis_DR in self.bases.items()}
        tensors |= {f"singular_values.{layer}": values_R for layer, values_R in self.singular_values.items()}
        save_artifact(folder, KIND, tensors, self.provenance, input_hash)

    @classmethod
    def load(cls, folder: Path) -> "Subspace":
        """Read a saved subspace.

        Raises:
            InputError: if it is missing or damaged, or a basis is not orthonormal.
        """
        tensors, header = load_artifact(folder, KIND)
        bases, singular_values = {}, {}
        for name, tensor in tensors.items():
            kind, _, layer = name.rpartition(".")
            (bases if kind == "basis" else singular_values)[int(layer)] = tensor
        for layer, basis_DR in bases.items():
            error = (basis_DR.T @ basis_DR - torch.eye(basis_DR.shape[1])).abs().max().item()
            if not error <= ORTHONORMAL_TOLERANCE:  # also catches NaN
                raise InputError(
                    f"the basis of layer {layer} in {folder} is not orthonormal (off by {error:.1e});\n"
                    "delete the folder and build the subspace again"
                )
        by_layer = sorted(bases)
        return cls(
            {layer: bases[layer] for layer in by_layer},
            {layer: singular_values[layer] for layer in by_layer},
            header["provenance"],
        )


def build_subspace(
    selection: FeatureSelection,
    decoders: Mapping[int, torch.Tensor],
    *,
    tau: float,
    weighting: bool,
    center: bool,
    provenance: Mapping[str, Any],
) -> Subspace:
    """Span the decoder directions of the chosen features, keeping a share `tau` of their variance in each layer.

    Args:
        selection: the chosen features of each layer.
        decoders: layer -> W_dec_FD, directions in the residual stream; rows need not have norm 1.
        tau: in (0, 1]; 0.8 in the paper.
        weighting: multiply each direction by its score (over the layer's largest) before the PCA.
        center: subtract the mean direction, as PCA does; without it the mean direction counts as the others do.
        provenance: JSON-able; kept, with what was done here added (`method` is "sails" unless it says otherwise).

    Raises:
        InputError: if tau is outside (0, 1], a layer has no decoder, features do not exist in it, or nothing is left
            to span (one feature and `center`, or all scores zero and `weighting`).
    """
    if not 0 < tau <= 1:
        raise InputError(f"tau is {tau}, but must be in (0, 1]: it is the share of the variance to keep (0.8 is usual)")
    bases, singular_values, layers = {}, {}, {}
    for layer, chosen in sorted(selection.layers.items()):
        if layer not in decoders:
            raise InputError(f"layer {layer} has chosen features but no SAE; SAEs are at layers {sorted(decoders)}")
        rows_KD = _unit_rows(layer, chosen, decoders[layer])
        weights_K = _weights(layer, chosen) if weighting else torch.ones(len(rows_KD), dtype=rows_KD.dtype)
        basis_DR, singular_values[layer], share = _principal(layer, weights_K[:, None] * rows_KD, tau, center)
        # The sign that an SVD returns is arbitrary; ours points to what is more active on the aligned side.
        aligned_D = rows_KD.T @ chosen.delta.cpu().double()
        bases[layer] = (basis_DR * torch.where(basis_DR.T @ aligned_D < 0, -1.0, 1.0)).float()
        layers[str(layer)] = {"n_directions": basis_DR.shape[1], "variance_kept": share}
    done = {"tau": tau, "weighting": weighting, "center": center, "features": selection.to_json(), "layers": layers}
    return Subspace(bases, singular_values, {"method": "sails", **provenance, **done})


def _unit_rows(layer: int, chosen: LayerSelection, W_dec_FD: torch.Tensor) -> torch.Tensor:
    """Decoder rows of the chosen features, made of norm 1 (few decoders have that): (K, D) float64."""
    d_sae, ids_K = W_dec_FD.shape[0], chosen.ids.cpu()
    if len(ids_K) and int(ids_K.max()) >= d_sae:
        raise InputError(
            f"layer {layer}: feature {int(ids_K.max())} was chosen, but the SAE has d_sae {d_sae};\n"
            "use the SAE that the features were found with"
        )
    return normalize(W_dec_FD.detach().cpu()[ids_K].double(), dim=1)


def _weights(layer: int, chosen: LayerSelection) -> torch.Tensor:
    """Scores over the largest one. (K,) float64"""
    score_K = chosen.score.cpu().double()
    if not (score_K > 0).any():
        raise InputError(f"layer {layer}: no chosen feature has a score above 0, so weighting leaves no direction")
    return score_K / score_K.max()


def _principal(
    layer: int, directions_KD: torch.Tensor, tau: float, center: bool
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Basis (D, R) float64, its singular values (R,), and the share of the squared singular values that it keeps."""
    if center and len(directions_KD) > 0:
        directions_KD = directions_KD - directions_KD.mean(dim=0)
    _, singular_N, components_ND = torch.linalg.svd(directions_KD, full_matrices=False)
    # Decoders are float32 and the longest row has norm 1 here: what is no larger than their rounding is no direction.
    singular_N = singular_N[singular_N > 10 * torch.finfo(torch.float32).eps * len(directions_KD) ** 0.5]
    if not len(singular_N):
        raise InputError(
            f"layer {layer}: its {len(directions_KD)} chosen features leave no direction"
            f"{' after centering; choose at least two, or do not center' if center else ''}"
        )
    share_N = singular_N.square().cumsum(0)
    share_N = share_N / share_N[-1]
    n_kept = int((share_N < tau).sum()) + 1
    return orthonormalize(components_ND[:n_kept].T), singular_N[:n_kept].float(), share_N[n_kept - 1].item()
