"""Change the residual stream while a model runs: add directions to it, or take a subspace out of it.

Hooks are always removed. Layer `l` means the output of block `l`, as in `hooks`.

Shapes: B batch, S sequence, D d_model, R directions.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from sails_align.core.errors import InputError
from sails_align.models.hooks import edited


@contextmanager
def added(model: nn.Module, directions: Mapping[int, Tensor]) -> Iterator[None]:
    """Within the block each of the layers' directions is added to its output, at every token.

    Args:
        model: as `hooks.decoder_layers` takes it; its `generate` is steered, too.
        directions: layer -> (D,), in the units of the residual stream.

    Raises:
        InputError: if a layer is not in the model, or a direction does not have its width.
    """
    for layer, direction_D in directions.items():
        check_shape(model, layer, direction_D.shape, 1)
    with edited(model, {layer: partial(_add, of) for layer, of in directions.items()}):
        yield


@contextmanager
def removed(model: nn.Module, bases: Mapping[int, Tensor]) -> Iterator[None]:
    """Within the block each layer's output has no part in its subspace: h <- h - (h B) B', at every token.

    Args:
        model: as `hooks.decoder_layers` takes it.
        bases: layer -> (D, R) with orthonormal columns, such as `Subspace.bases`.

    Raises:
        InputError: if a layer is not in the model, or a basis does not have its width.
    """
    for layer, basis_DR in bases.items():
        check_shape(model, layer, basis_DR.shape, 2)
    with edited(model, {layer: partial(_remove, of) for layer, of in bases.items()}):
        yield


def _add(direction_D: Tensor, hidden_BSD: Tensor) -> Tensor:
    return hidden_BSD + direction_D.to(hidden_BSD)


def _remove(basis_DR: Tensor, hidden_BSD: Tensor) -> Tensor:
    basis_DR = basis_DR.to(hidden_BSD)
    return hidden_BSD - (hidden_BSD @ basis_DR) @ basis_DR.T


def check_shape(model: nn.Module, layer: int, shape: Sequence[int], n_dimensions: int) -> None:
    """Raise `InputError` if a direction (D,) or basis (D, R) does not have the model's width."""
    d_model = model.config.get_text_config().hidden_size  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    if len(shape) != n_dimensions or shape[0] != d_model:
        raise InputError(
            f"the direction of layer {layer} has shape {tuple(shape)}, but the model has d_model {d_model};\n"
            "give one that was found in this model"
        )
