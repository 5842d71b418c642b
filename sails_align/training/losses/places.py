"""Find the places of tokens in their responses. Shapes: B batch, S sequence."""

import torch
from torch import Tensor


def places(batch: dict[str, Tensor]) -> Tensor:
    """Return the place of each next token among the trained tokens of its example, from 0; -1 if it is not trained.

    With packing a row holds several examples, each of which begins where the position is 0. (B, S - 1)
    """
    trained_BS = (batch["labels"] != -100).long()
    before_BS = trained_BS.cumsum(dim=1) - trained_BS  # trained tokens of the row before this one
    if "position_ids" in batch:
        begins_BS = batch["position_ids"] == 0
        before_BS = before_BS - torch.where(begins_BS, before_BS, 0).cummax(dim=1).values
    return torch.where(trained_BS == 1, before_BS, -1)[:, 1:]
