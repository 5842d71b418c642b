"""Draw batches of texts that a loss reads beside the batches of the training, the same ones after a resume.

Shapes: B batch, S sequence, D d_model.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sails_align.core.distributed import n_processes, process_index
from sails_align.core.errors import InputError
from sails_align.data.refusals import harmful_rows
from sails_align.data.tokens import TokenizedSide, batches_by_length, padded, tokenize_response
from sails_align.initializers.examples import N_EXAMPLES
from sails_align.models.hooks import evaluation_mode, hidden_states_at


def answers(tokenizer: PreTrainedTokenizerBase, rows: Dataset, column: str, max_length: int) -> list[TokenizedSide]:
    """Return the first conversations of some data, each with a mask of its response's tokens.

    Raises `InputError` if nothing of a response is left at `max_length`.
    """
    sides = [
        tokenize_response(tokenizer, row["prompt"], row[column], max_length)
        for row in rows.select(range(min(N_EXAMPLES, len(rows)))).to_list()
    ]
    cut = sum(not any(side.mask) for side in sides)
    if cut:
        raise InputError(
            f"of {cut} {column} responses nothing is left at max_length {max_length};\nchoose a larger --max_length"
        )
    return sides


def harmful_pairs(rows: Dataset, loss: str) -> Dataset:
    """Return the safety data without the rows of harmless requests (`harmful` is false), for the loss of that name.

    Raises `InputError` if no row is left.
    """
    numbers = harmful_rows(rows)
    if not numbers:
        raise InputError(
            f"loss is {loss}, which reads answers to harmful requests, but each row of the safety data has "
            "harmful: false;\ngive pairs of harmful requests, or leave the loss out"
        )
    return rows.select(numbers) if len(numbers) < len(rows) else rows


class SideBatches:
    """Give each batch of a training some texts, which depend on its number and the seed alone."""

    def __init__(self, n: int, size: int, seed: int) -> None:
        """Take the number of texts, how many are drawn for a batch of one process, and the seed."""
        self._n, self._size, self._seed = n, size, seed
        self._step, self._place = -1, 0

    def turn(self, trainer: Any) -> int:
        """Return the number of the batch; call it once for each."""
        step = trainer.state.global_step
        self._place = self._place + 1 if step == self._step else 0
        self._step = step
        return step * trainer.args.gradient_accumulation_steps + self._place

    def indices(self, turn: int) -> list[int]:
        """Return which texts this process reads in a batch; each is read once before one is read again."""
        first = (turn * n_processes() + process_index()) * self._size
        return [self._order(place // self._n)[place % self._n] for place in range(first, first + self._size)]

    def _order(self, epoch: int) -> list[int]:
        return torch.randperm(self._n, generator=torch.Generator().manual_seed(self._seed + epoch)).tolist()


def mean_states(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Return the mean hidden state over the tokens in a mask, in float32. (B, D)"""
    mask_BS1 = mask_BS.to(hidden_BSD.device)[..., None].float()
    return (hidden_BSD.float() * mask_BS1).sum(1) / mask_BS1.sum(1)


def frozen_mean_states(model: nn.Module, layer: int, sides: Sequence[TokenizedSide]) -> Tensor:
    """Return the mean hidden state of each text in the model as it is now, on the CPU. (N, D) float32"""
    found = torch.empty(0)
    with evaluation_mode(model):
        for ids, group in _by_length(sides):
            ids_BS, attention_BS, mask_BS = padded(group)
            means_BD = mean_states(hidden_states_at(model, [layer], ids_BS, attention_BS)[layer], mask_BS).cpu()
            found = found if len(found) else means_BD.new_zeros(len(sides), means_BD.shape[1])
            found[ids] = means_BD
    return found


def _by_length(sides: Sequence[TokenizedSide]) -> Iterator[tuple[list[int], list[TokenizedSide]]]:
    """Yield batches of texts of like length, with their places."""
    places: Mapping[int, int] = {id(side): place for place, side in enumerate(sides)}
    for group in batches_by_length(sides, max_tokens=4096, batch_size=16):
        yield [places[id(side)] for side in group], group
