"""Change the residual stream while a model runs: add directions to it, or take a subspace out of it.

Hooks are always removed. Layer `l` means the output of block `l`, as in `hooks`.

Shapes: B batch, S sequence, D d_model, R directions.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from sails_align.core.errors import InputError
from sails_align.models.hooks import check_layers

Edit = Callable[[Tensor], Tensor]
"""Of hidden states (B, S, D)."""


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
        _check_shape(model, layer, direction_D.shape, 1)
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
        _check_shape(model, layer, basis_DR.shape, 2)
    with edited(model, {layer: partial(_remove, of) for layer, of in bases.items()}):
        yield


def _add(direction_D: Tensor, hidden_BSD: Tensor) -> Tensor:
    return hidden_BSD + direction_D.to(hidden_BSD)


def _remove(basis_DR: Tensor, hidden_BSD: Tensor) -> Tensor:
    basis_DR = basis_DR.to(hidden_BSD)
    return hidden_BSD - (hidden_BSD @ basis_DR) @ basis_DR.T


def _check_shape(model: nn.Module, layer: int, shape: torch.Size, n_dimensions: int) -> None:
    d_model = model.config.get_text_config().hidden_size  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    if len(shape) != n_dimensions or shape[0] != d_model:
        raise InputError(
            f"the direction of layer {layer} has shape {tuple(shape)}, but the model has d_model {d_model};\n"
            "give one that was found in this model"
        )


@contextmanager
def edited(model: nn.Module, edits: Mapping[int, Edit], d_model: int | None = None) -> Iterator[None]:
    """Within the block each layer's output is what its edit makes of it.

    Args:
        model: as `hooks.decoder_layers` takes it.
        edits: by layer.
        d_model: width that the edits are for; None: it is checked elsewhere.

    Raises:
        InputError: if a layer is not in the model, or it has another width.
    """
    if d_model is not None:
        for layer in edits:
            _check_shape(model, layer, torch.Size([d_model]), 1)

    def hook(edit: Edit, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    blocks = check_layers(model, edits)
    handles = [blocks[layer].register_forward_hook(partial(hook, edit)) for layer, edit in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
