"""Load sparse autoencoders (SAEs) of the residual stream with sae-lens.

`load_sae` refuses an SAE that does not fit the model, and brings it into one convention: `encode` takes the output of
block l as the Hugging Face model gives it, and `acts_TF @ W_dec_FD` is in the units of that output.

Shapes: T tokens, D d_model, F d_sae.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sails_align.core.artifacts import tensors_hash
from sails_align.core.errors import InputError
from sails_align.saes.checks import check_fits, layer_of_sae
from sails_align.saes.files import read_sae
from sails_align.saes.source import SAESource

if TYPE_CHECKING:
    from sae_lens import SAE

# A transcoder reads one place and writes another; a temporal SAE encodes a token by those before it.
_NOT_OF_ONE_TOKEN = {"temporal", "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"}


@dataclass(frozen=True)
class SAEInfo:
    """Metadata of an SAE."""

    layer: int
    """The block (0-based) whose output it reads and writes."""
    d_model: int
    d_sae: int
    architecture: str
    """sae-lens' name: "jumprelu", "topk", "standard", ..."""
    hook_name: str
    """Hook point in its configuration."""
    model_name: str | None
    """Model it was trained on, according to its configuration."""
    source: str
    """`release/sae_id`, or the path."""
    sha256: str
    """`tensors_hash` of the weights in use (float32, folded)."""


@dataclass(frozen=True, eq=False)
class ResidualSAE:
    """A frozen SAE of one block's output."""

    info: SAEInfo
    sae: "SAE[Any]"
    """sae-lens' SAE; its hook points and options remain available."""

    @torch.no_grad()
    def encode(self, hidden_TD: Tensor) -> Tensor:
        """Return the activations (T, F) in float32 of block outputs of any dtype and device."""
        return self.sae.encode(hidden_TD.to(self.sae.W_dec.device))

    @torch.no_grad()
    def decode(self, acts_TF: Tensor) -> Tensor:
        """Return the reconstruction (T, D) in float32, in the residual stream's units.

        Where `sae.cfg.normalize_activations` is not "none", it is that of the tokens last encoded.
        """
        return self.sae.decode(acts_TF)

    def decode_gradient(self, acts_TF: Tensor, gradient_TD: Tensor) -> Tensor:
        """Return a gradient with respect to activations (T, F), given that with respect to their reconstruction.

        It is `gradient_TD @ W_dec_FD.T` but for `sae.cfg.normalize_activations`: then the tokens must be those last
        encoded.
        """
        leaf_TF = acts_TF.detach().requires_grad_()
        with torch.enable_grad():
            decoded_TD = self.sae.decode(leaf_TF)
        (gradient_TF,) = torch.autograd.grad(decoded_TD, leaf_TF, gradient_TD.to(decoded_TD))
        return gradient_TF

    @property
    def W_dec_FD(self) -> Tensor:
        """Return the decoder directions (F, D) in the residual stream, float32; few SAEs have unit rows.

        `acts_TF @ W_dec_FD + b_dec` is the reconstruction: constant input scaling and TopK's decoder norms are folded
        in. With "layer_norm" or "constant_norm_rescale" the units are those of the normalised token.
        """
        return self.sae.W_dec.detach()


def load_sae(
    source: SAESource, name: str, *, model_config: PretrainedConfig, model_name: str, device: str = "cpu"
) -> ResidualSAE:
    """Load one SAE of a source (`name` is one of `files.names_of`), in float32, and check that it fits the model.

    Raises `InputError` as `read_sae`, `residual_sae` and `check_fits`, or for weights that are not finite.
    """
    sae = residual_sae(name, read_sae(source, name, device))
    check_fits(sae.info, model_config, model_name, source.allow_mismatch)
    for weight, values in sae.sae.state_dict().items():
        if not values.isfinite().all():
            raise InputError(f"SAE {name} has numbers in {weight} that are not finite; load or train it again")
    return sae


def residual_sae(source: str, sae: "SAE[Any]") -> ResidualSAE:
    """Freeze an SAE of sae-lens and bring it into the convention of this module, in place.

    Raises `InputError` if it is not of the residual stream, or its input scaling is unknown.
    """
    metadata = sae.cfg.metadata
    hook_names = [name for name in (metadata.hook_name, metadata.hf_hook_name) if name]
    architecture = sae.cfg.architecture()
    if architecture in _NOT_OF_ONE_TOKEN:
        raise InputError(
            f"SAE {source} is a {architecture}, which does not encode a token of the residual stream alone;\n"
            "give a standard, TopK, JumpReLU or gated SAE"
        )
    layer = layer_of_sae(source, hook_names)
    if sae.cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        raise InputError(
            f"SAE {source} expects inputs scaled by a constant ({sae.cfg.normalize_activations}) that is not stored "
            "with it;\nload it by its release, or fold the scaling into the weights before saving it"
        )
    if architecture == "topk" and sae.cfg.rescale_acts_by_decoder_norm:
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False  # a no-op on unit rows that would cost a norm at every `encode`
    sae.requires_grad_(False).eval()
    info = SAEInfo(
        layer=layer,
        d_model=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        architecture=architecture,
        hook_name=hook_names[0],
        model_name=metadata.model_name,
        source=source,
        sha256=tensors_hash(sae.state_dict()),
    )
    return ResidualSAE(info, sae)
