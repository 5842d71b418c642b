"""Turn chosen features into a subspace, with one orthonormal basis for each layer with an SAE.

Decoder directions of the chosen features -> (weighted) PCA keeping a share tau of the variance -> QR
(SAILS, arXiv 2512.23260).

Shapes: D d_model, F d_sae, K chosen features, R directions kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

from sails_align.core.artifacts import content_hash, load_artifact, save_artifact
from sails_align.core.errors import InputError
from sails_align.core.linalg import orthonormalize
from sails_align.saes.load import ResidualSAE
from sails_align.subspace.selection import FeatureSelection, LayerSelection

if TYPE_CHECKING:
    from pandas import DataFrame

KIND = "subspace"
NUMBERS = ("delta", "score", "rate_aligned", "rate_unaligned", "effect")
"""Of each chosen feature; `effect` only if it is the score."""
SHOWN_LAYERS = 6
"""Maximum number of layers in `repr`."""
ORTHONORMAL_TOLERANCE = 1e-4  # float32 rounding over some thousand dimensions stays well under it


@dataclass(frozen=True, eq=False)
class Subspace:
    """Directions of the residual stream at the output of some blocks.

    Examples:
        >>> _ = subspace.save("found")
        >>> sails.Subspace.load("found").features().equals(subspace.features())
        True
    """

    bases: dict[int, torch.Tensor]
    "layer -> basis_DR float32 with orthonormal columns, most important first."
    singular_values: dict[int, torch.Tensor]
    "layer -> (R,), what the columns were ranked by."
    provenance: dict[str, Any]
    "JSON-able: how it came about."
    writers: dict[int, torch.Tensor] | None = None
    "Bases, likewise, for modules that write to the residual stream; None: they take `bases`, too."
    onset: int | None = None
    "The first layer that tells harmful prompts from harmless ones (`separation.onset_of`); None: not looked for."

    def __post_init__(self) -> None:
        assert self.bases.keys() == self.singular_values.keys(), "every basis has its singular values"
        if not self.bases:
            raise InputError("a subspace needs layers; give at least one")
        assert self.writers is None or self.writers.keys() == self.bases.keys(), "both have the same layers"
        widths = {name: basis_DR.shape[0] for name, basis_DR in self.tensors().items()}
        if len(set(widths.values())) > 1:
            raise InputError(f"the layers of a subspace differ in d_model ({widths}); they must be of one model")
        # One memory order (column-major, as QR gives it): products round differently in another one, and a training
        # from a loaded subspace would not repeat the one from the same subspace fresh from discovery.
        object.__setattr__(self, "bases", _in_order(self.bases))
        if self.writers is not None:
            object.__setattr__(self, "writers", _in_order(self.writers))

    @property
    def d_model(self) -> int:
        return next(iter(self.bases.values())).shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the bases by name, as they are saved."""
        named = {f"basis.{layer}": basis_DR for layer, basis_DR in self.bases.items()}
        return named | {f"writers.{layer}": basis_DR for layer, basis_DR in (self.writers or {}).items()}

    def __repr__(self) -> str:
        method = self.provenance.get("method", "unknown")
        lines = [f"{type(self).__name__} found by {method}: d_model {self.d_model}"]
        if self.onset is not None:
            lines[0] += f", harmful prompts are told from harmless ones from layer {self.onset} on"
        for layer, basis_DR in list(self.bases.items())[:SHOWN_LAYERS]:
            writers = "" if self.writers is None else f" for readers, {self.writers[layer].shape[1]} for writers"
            lines.append(f"  layer {layer}: {basis_DR.shape[1]} directions{writers}")
        if len(self.bases) > SHOWN_LAYERS:
            lines.append(f"  and {len(self.bases) - SHOWN_LAYERS} more layers")
        return "\n".join(lines)

    def features(self) -> "DataFrame":
        """Return a row for each SAE feature that the subspace is made of.

        Columns: `layer`, `used_by` (`readers`, `writers` or `all` modules), `id`, `score` (of its contrast), `promoted`
        (the tokens that it raises most) and `link` (its page at Neuronpedia); only `discover` adds the last two. Raises
        `InputError` if it is made of none.
        """
        from pandas import DataFrame

        columns = ["layer", "used_by", "id", "score", "promoted", "link"]
        return DataFrame(self.feature_rows(), columns=columns)

    def feature_rows(self) -> list[dict[str, Any]]:
        """Return what `features` does and more, as dictionaries.

        In addition: `delta`, the difference of the mean activations (aligned minus unaligned side), `rate_aligned` and
        `rate_unaligned`, the shares of texts in which the feature is active, and with a score that needs it the
        `effect` on the refusal margin. Raises `InputError` as `features`.
        """
        if "features" not in self.provenance:
            method = self.provenance.get("method")
            raise InputError(f"the subspace was found by {method}, which uses no SAE features; use sails")
        users = {"all" if self.writers is None else "readers": self.provenance}
        if "writers" in self.provenance:
            users["writers"] = self.provenance["writers"]
        rows = []
        for used_by, about in users.items():
            for layer, of in about.get("features", {"layers": {}})["layers"].items():
                for place, feature in enumerate(of["ids"]):
                    numbers = {name: of[name][place] for name in NUMBERS if name in of}
                    described = {"promoted": of.get("promoted"), "link": of.get("links")}
                    described = {name: values and values[place] for name, values in described.items()}
                    rows.append({"layer": int(layer), "used_by": used_by, "id": feature, **numbers, **described})
        return rows

    def save(self, folder: str | Path, input_hash: str | None = None) -> None:
        """Write `subspace.safetensors` and `subspace.json` (see `artifacts`); the default hash is of `provenance`."""
        folder, input_hash = Path(folder), input_hash or content_hash({"subspace": self.provenance})
        values = {f"singular_values.{layer}": values_R for layer, values_R in self.singular_values.items()}
        about = {**self.provenance, "onset": self.onset}
        save_artifact(folder, KIND, self.tensors() | values, about, input_hash)

    @classmethod
    def load(cls, folder: str | Path) -> "Subspace":
        """Read a saved subspace; raise `InputError` if it is missing, damaged, or a basis is not orthonormal."""
        tensors, header = load_artifact(Path(folder), KIND)
        found: dict[str, dict[int, torch.Tensor]] = {"basis": {}, "writers": {}, "singular_values": {}}
        for name, tensor in sorted(tensors.items(), key=lambda item: int(item[0].rpartition(".")[2])):
            kind, _, layer = name.rpartition(".")
            found[kind][int(layer)] = tensor
        for layer, basis_DR in [*found["basis"].items(), *found["writers"].items()]:
            error = (basis_DR.T @ basis_DR - torch.eye(basis_DR.shape[1])).abs().max().item()
            if not error <= ORTHONORMAL_TOLERANCE:  # also catches NaN
                raise InputError(
                    f"the basis of layer {layer} in {folder} is not orthonormal (off by {error:.1e});\n"
                    "delete the folder and build the subspace again"
                )
        provenance = dict(header["provenance"])
        onset = provenance.pop("onset", None)
        return cls(found["basis"], found["singular_values"], provenance, found["writers"] or None, onset)


def _in_order(bases: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {layer: basis_DR.T.contiguous().T for layer, basis_DR in bases.items()}


def build_subspace(
    selection: FeatureSelection,
    saes: Mapping[int, ResidualSAE],
    *,
    tau: float,
    weighting: bool,
    center: bool,
    provenance: Mapping[str, Any],
    benign: Mapping[int, torch.Tensor] | None = None,
) -> Subspace:
    """Span the decoder directions of the chosen features, keeping a share `tau` of their variance in each layer.

    Args:
        selection: the chosen features of each layer.
        saes: by layer; each is loaded once.
        tau: in (0, 1]; 0.8 in the paper.
        weighting: multiply each direction by its score (over the layer's largest) before the PCA.
        center: subtract the mean direction, as PCA does; without it the mean direction counts as the others do.
        provenance: JSON-able; what was done here is added (`method` is "sails" unless it says otherwise).
        benign: layer -> covariance (D, D) that the directions are ranked against; see `principal`.

    Raises:
        InputError: if nothing is left to span (one feature and `center`, or all scores zero and `weighting`).
    """
    bases, singular_values, layers = {}, {}, {}
    for layer, chosen in sorted(selection.layers.items()):
        rows_KD = normalize(saes[layer].W_dec_FD.cpu()[chosen.ids.cpu()].double(), dim=1)
        weights_K = _weights(layer, chosen) if weighting else torch.ones(len(rows_KD), dtype=rows_KD.dtype)
        benign_DD = None if benign is None else benign[layer]
        basis_DR, singular_values[layer], share = principal(
            layer, weights_K[:, None] * rows_KD, tau=tau, center=center, benign_DD=benign_DD
        )
        # The sign that an SVD returns is arbitrary; ours points to what is more active on the aligned side, or (where
        # effects are known) to what makes refusal likelier.
        toward_K = chosen.delta if chosen.effect is None else chosen.effect
        aligned_D = rows_KD.T @ toward_K.cpu().double()
        bases[layer] = (basis_DR * torch.where(basis_DR.T @ aligned_D < 0, -1.0, 1.0)).float()
        layers[str(layer)] = {"n_directions": basis_DR.shape[1], "variance_kept": share}
    done = {"tau": tau, "weighting": weighting, "center": center, "features": selection.to_json(), "layers": layers}
    return Subspace(bases, singular_values, {"method": "sails", **provenance, **done})


def _weights(layer: int, chosen: LayerSelection) -> torch.Tensor:
    """Return scores over the largest one. (K,) float64"""
    score_K = chosen.score.cpu().double()
    if not (score_K > 0).any():
        raise InputError(
            f"layer {layer}: no chosen feature has a score above 0, so weighting leaves no direction;\n"
            "the two sides of the contrast are alike: check the data"
        )
    return score_K / score_K.max()


def principal(
    layer: int, directions_KD: torch.Tensor, *, tau: float, center: bool, benign_DD: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return an orthonormal basis (D, R) of the rows' principal directions, its singular values (R,), and their share.

    The basis is float64, most important direction first. It keeps a share `tau` of the squared singular values. With a
    positive definite covariance `benign_DD` (C), it is of the generalised eigenvectors `v` with the largest
    `v' S v / v' C v`, where S is the rows' scatter: the rows vary along them, harmless text hardly. Raises an
    `InputError` that names the layer if no direction is left.
    """
    if benign_DD is not None:
        factor_DD = torch.linalg.cholesky(benign_DD)
        directions_KD = torch.linalg.solve_triangular(factor_DD, directions_KD.T, upper=False).T
    largest = directions_KD.norm(dim=1).max().item() if len(directions_KD) else 0.0
    if center and len(directions_KD) > 0:
        directions_KD = directions_KD - directions_KD.mean(dim=0)
    _, singular_N, components_ND = torch.linalg.svd(directions_KD, full_matrices=False)
    # Decoders are float32: what is no larger than the rounding of the longest row is no direction.
    singular_N = singular_N[singular_N > 10 * torch.finfo(torch.float32).eps * len(directions_KD) ** 0.5 * largest]
    if not len(singular_N):
        raise InputError(
            f"layer {layer}: its {len(directions_KD)} chosen features leave no direction"
            f"{' after centering; choose at least two, or do not center' if center else ''}"
        )
    share_N = singular_N.square().cumsum(0)
    share_N = share_N / share_N[-1]
    n_kept = int((share_N < tau).sum()) + 1
    basis_DR = components_ND[:n_kept].T
    if benign_DD is not None:
        basis_DR = torch.linalg.solve_triangular(factor_DD.T, basis_DR, upper=True)
    return orthonormalize(basis_DR), singular_N[:n_kept].float(), share_N[n_kept - 1].item()
