"""Count the parameters of a model: what estimates, metrics and model cards state."""

import math

import torch
from torch import nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the trainable parameters, and all but those of the adapter copy that is DPO's reference.

    It works for weights on the meta device, in 4 bits, and split by ZeRO-3.
    """
    n_trainable = n_all = 0
    for name, parameter in model.named_parameters():
        n = getattr(parameter, "ds_numel", n_weights(parameter))  # the first is of a parameter that ZeRO-3 has split
        n_all += 0 if ".ref." in name else n
        n_trainable += n if parameter.requires_grad else 0
    return n_trainable, n_all


def n_weights(parameter: torch.Tensor) -> int:
    """Return how many weights a parameter stands for: bitsandbytes packs two of 4 bits, or more, into one number."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)
