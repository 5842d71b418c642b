"""Measure how much a model's weights matter for its answers: the diagonal of the Fisher information.

Shapes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sails_align.core.errors import InputError
from sails_align.core.progress import progress_bar
from sails_align.edits.linears import Place
from sails_align.models.blocks import Batch
from sails_align.models.hooks import evaluation_mode


def fisher_information(model: nn.Module, places: Mapping[str, Place], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the squared gradient of the loss, averaged over batches, for the named linear layers; on the CPU.

    As upstream (pikepokenew/IRR), the gradient is that of a batch's mean loss over the tokens in its mask, and not of
    each example. The model must be whole and in a type that holds gradients (float32).

    Raises:
        InputError: if the device has too little memory, or the gradient is not finite.
    """
    parameters = {name: place.of(model).weight for name, place in places.items()}
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    try:
        with evaluation_mode(model), progress_bar(shown=True) as bar:
            for batch in bar.track(batches, description="Fisher information"):
                gradients = torch.autograd.grad(_loss(model, batch), list(parameters.values()))
                for name, gradient in zip(parameters, gradients, strict=True):
                    sums[name] += gradient.square()
    except torch.OutOfMemoryError as error:
        raise InputError("the gradients do not fit on the device; use --device cpu, or --sparsity 0") from error
    found = {name: (total / len(batches)).cpu() for name, total in sums.items()}
    if not all(information.isfinite().all() for information in found.values()):
        raise InputError("the gradients of the aligned model are not finite; check that it is whole")
    return found


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean negative log-likelihood of the tokens in the mask."""
    ids_BS, attention_BS, mask_BS = (each.to(next(model.parameters()).device) for each in batch)
    logits_BSV = model(input_ids=ids_BS, attention_mask=attention_BS, use_cache=False).logits
    is_target_BS = mask_BS[:, 1:]
    return cross_entropy(logits_BSV[:, :-1][is_target_BS].float(), ids_BS[:, 1:][is_target_BS])
