"""Measure how much a model's weights matter for its answers: the diagonal of the Fisher information.

Shapes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sails_align.core.errors import InputError
from sails_align.core.progress import progress_bar
from sails_align.edits.temporary import zeros_in_file
from sails_align.models.blocks import Batch
from sails_align.models.hooks import evaluation_mode


def fisher_information(
    model: nn.Module, parameters: Mapping[str, Tensor], batches: Sequence[Batch], *, remedy: str
) -> dict[str, Tensor]:
    """Return the squared gradient of the loss, averaged over batches, for named parameters.

    As upstream (pikepokenew/IRR), the gradient is that of a batch's mean loss over the tokens in its mask, and not of
    each example. The model must be whole, and of a type that holds gradients. Each gradient is added up, and freed, as
    soon as it is there. The sums are on the CPU, in temporary files: of a large model, they would not fit into memory
    beside it.

    Args:
        model: is left as it was.
        parameters: some of the model's.
        batches: of texts, with masks.
        remedy: what the user can do if the memory does not suffice.

    Raises:
        InputError: if the device has too little memory, or the gradient is not finite.
    """
    had_gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    sums = {name: _zeros_like(parameter) for name, parameter in parameters.items()}
    handles = []
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(partial(_add_square, sums[name], len(batches))))
    try:
        with evaluation_mode(model), progress_bar(shown=True) as bar:
            for batch in bar.track(batches, description="Fisher information"):
                _loss(model, batch).backward()
    except torch.OutOfMemoryError as error:
        raise InputError(f"the gradients for the Fisher information do not fit on the device; {remedy}") from error
    finally:
        for handle in handles:
            handle.remove()
        for parameter, had in had_gradients.items():
            parameter.requires_grad_(had)
    if not all(information.isfinite().all() for information in sums.values()):
        raise InputError("the gradients for the Fisher information are not finite; check that the model is whole")
    return sums


def _zeros_like(parameter: Tensor) -> Tensor:
    """Return zeros of a parameter's shape, in float32 or float64."""
    return zeros_in_file(parameter.shape, torch.promote_types(parameter.dtype, torch.float32))


def _add_square(total: Tensor, n: int, parameter: Tensor) -> None:
    """Add the square of a gradient divided by `n`, and free the gradient."""
    assert parameter.grad is not None, "it was just computed"
    total += parameter.grad.to(total.dtype).square().to(total.device) / n
    parameter.grad = None


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean negative log-likelihood of the tokens in the mask."""
    ids_BS, attention_BS, mask_BS = (each.to(next(model.parameters()).device) for each in batch)
    logits_BSV = model(input_ids=ids_BS, attention_mask=attention_BS, use_cache=False).logits
    is_target_BS = mask_BS[:, 1:]
    return cross_entropy(logits_BSV[:, :-1][is_target_BS].float(), ids_BS[:, 1:][is_target_BS])
