"""Change the residual stream while a model runs: add directions, or remove a subspace. Hooks are always removed again.

Layer `l` means the output of block `l`, as in `models.hooks`.

Shapes: B batch, S sequence, D d_model, R directions.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor, nn

from sails_align.core.errors import InputError
from sails_align.models.hooks import edited


def added(model: nn.Module, directions: Mapping[int, Tensor]) -> AbstractContextManager[None]:
    """Add a direction to the output of each layer within the block, at every token.

    Args:
        model: as `hooks.decoder_layers` takes it; its `generate` is steered, too.
        directions: layer -> (D,), in the units of the residual stream.

    Raises:
        InputError: if a layer is not in the model, or a direction does not have its width.
    """
    check_width(model, directions, 1)
    return edited(model, {layer: partial(_add, direction_D) for layer, direction_D in directions.items()})


def removed(model: nn.Module, bases: Mapping[int, Tensor]) -> AbstractContextManager[None]:
    """Remove a subspace from the output of each layer within the block, at every token: h <- h - (h B) B'.

    Args:
        model: as `hooks.decoder_layers` takes it.
        bases: layer -> (D, R) with orthonormal columns, such as `Subspace.bases`.

    Raises:
        InputError: if a layer is not in the model, or a basis does not have its width.
    """
    check_width(model, bases, 2)
    return edited(model, {layer: partial(remove, basis_DR) for layer, basis_DR in bases.items()})


def remove(basis_DR: Tensor, hidden_BSD: Tensor, strength: float = 1.0) -> Tensor:
    """Return the hidden states without a share of a subspace."""
    basis_DR = basis_DR.to(hidden_BSD)
    return hidden_BSD - strength * (hidden_BSD @ basis_DR) @ basis_DR.T


def _add(direction_D: Tensor, hidden_BSD: Tensor) -> Tensor:
    return hidden_BSD + direction_D.to(hidden_BSD)


def check_width(model: nn.Module, directions: Mapping[int, Tensor], n_dimensions: int) -> None:
    """Check that directions or bases are as wide as the model; raise `InputError` if one is not."""
    d_model = model.config.get_text_config().hidden_size  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    for layer, direction in directions.items():
        if direction.ndim != n_dimensions or direction.shape[0] != d_model:
            raise InputError(
                f"the direction of layer {layer} has shape {tuple(direction.shape)}, but the model has d_model "
                f"{d_model};\ngive one that was found in this model"
            )
