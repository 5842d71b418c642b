"""Score the units of a model on a set of conversations: how much their activations vary, and how much they are read.

The score of structured pruning by fluctuation (FLAP, arXiv 2312.11983). For channel j, which is read
through the weights W:

    I_j = Var(x_j) * |W[:, j]|^2

with the unbiased variance over tokens. A channel that is constant scores 0 however large it is: a bias could replace
it. For channels that several modules read, the squared norms are added.

Shapes: T tokens, C channels, O outputs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sails_align.core.errors import InputError
from sails_align.data.tokens import TokenizedSide, padded
from sails_align.models.hooks import at_tokens, decoder_layers, evaluation_mode, hidden_states_at
from sails_align.models.inputs import watched_inputs
from sails_align.subspace.forward import batches
from sails_align.units.layout import GROUPS, key_of, linear_of


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Mean and spread of channels over some tokens; sums of these are those of all the tokens."""

    n: int
    mean: Tensor
    "(C,), float64"
    squares: Tensor
    "Sum of the squared distances from the mean (C,)."

    @classmethod
    def of(cls, values_TC: Tensor) -> "ChannelStats":
        """Sum up the values at some tokens, in float64."""
        values_TC = values_TC.double()
        mean_C = values_TC.mean(0)
        return cls(len(values_TC), mean_C, (values_TC - mean_C).square().sum(0))

    def __add__(self, other: "ChannelStats") -> "ChannelStats":
        """Join the tokens of both (Chan, Golub and LeVeque 1983)."""
        n = self.n + other.n
        apart_C = other.mean - self.mean
        squares_C = self.squares + other.squares + apart_C.square() * (self.n * other.n / n)
        return ChannelStats(n, self.mean + apart_C * (other.n / n), squares_C)

    @property
    def variance(self) -> Tensor:
        """Return the unbiased variance (C,); raise `InputError` if there are fewer than two tokens."""
        if self.n < 2:
            raise InputError(f"there are {self.n} tokens, but a variance needs two; give more conversations")
        return self.squares / (self.n - 1)


def channel_scores(variance_C: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return the scores (C,) of channels that are read through some weights, each (O, C)."""
    return variance_C * sum(weight_OC.double().square().sum(0) for weight_OC in weights)


@torch.no_grad()
def channel_stats(model: nn.Module, sequences: Iterable[TokenizedSide]) -> dict[str, ChannelStats]:
    """Run sequences through a model and sum up all channels, at the tokens of each sequence's mask.

    Returns:
        the statistics by group (`key_of`), on the CPU.
    """
    stats: dict[str, ChannelStats] = {}
    mask_BS = torch.empty(0)

    def add(name: str, input_BSC: Tensor) -> None:
        found = ChannelStats.of(at_tokens(input_BSC, mask_BS))
        found = ChannelStats(found.n, found.mean.cpu(), found.squares.cpu())
        key = keys[name]
        stats[key] = stats[key] + found if key in stats else found

    blocks = decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    keys = {
        names[id(linear_of(block, group.readers[0]))]: key_of(index, group)
        for index, block in enumerate(blocks)
        for group in GROUPS
    }
    with evaluation_mode(model), watched_inputs(model, keys, add):
        for batch in batches(sequences, batch_size=16, max_tokens_per_batch=4096):
            input_ids_BS, attention_mask_BS, mask_BS = padded(batch)
            hidden_states_at(model, [len(blocks) - 1], input_ids_BS, attention_mask_BS)
    if not stats:
        raise InputError("the conversations have no tokens to look at; check the data, and --max_length")
    return stats


def unit_scores(model: nn.Module, stats: dict[str, ChannelStats]) -> dict[str, Tensor]:
    """Return the scores (C,) of all units by group, from the statistics of their channels."""
    return {
        key_of(index, group): channel_scores(
            stats[key_of(index, group)].variance,
            [linear_of(block, path).weight.detach().cpu() for path in group.readers],
        )
        for index, block in enumerate(decoder_layers(model))
        for group in GROUPS
    }
