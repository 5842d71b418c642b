"""Run the contrasts through the model and feed the fitters, with one truncated forward pass per batch.

Everything streams. At any time a window of sequences, one batch and the fitters' sums are in memory, so memory does
not depend on the number of examples.

Shapes: B batch, S sequence, T averaged tokens of a batch, D d_model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from sails_align.core.distributed import summed
from sails_align.core.errors import InputError
from sails_align.core.progress import progress_bar
from sails_align.data.tokens import TokenizedSide, padded
from sails_align.models.hooks import evaluation_mode, hidden_states_at

WINDOW = 512
"""Sequences that are sorted by length together, so that those of a batch need little padding."""


class Fitter(Protocol):
    """A consumer of hidden states: `FeatureFitter`, `ActivationFitter`."""

    def update(self, contrast: str, side: str, layer: int, hidden_TD: Tensor) -> None: ...


def discover(
    model: nn.Module,
    contrasts: Mapping[str, Mapping[str, Iterable[TokenizedSide]]],
    fitters: Sequence[Fitter],
    layers: Sequence[int],
    *,
    batch_size: int = 16,
    max_tokens_per_batch: int = 4096,
    progress: bool = False,
) -> None:
    """Feed the hidden states at the masked tokens of every sequence to all fitters.

    The model is put into evaluation mode for the time being. Blocks deeper than the deepest layer are not run, nor are
    the tokens after a sequence's last masked one: in a causal model nothing that is averaged depends on them.

    Args:
        model: a decoder on one or several devices, with or without its head (see `truncated.load_truncated`).
        contrasts: contrast -> side -> sequences, consumed lazily and once; sides as in `stats.SIDES`. Of several
            processes each gives its share.
        fitters: all are given the same hidden states, in the model's precision.
        layers: whose outputs are wanted, at least one.
        batch_size: sequences in a batch, at most.
        max_tokens_per_batch: tokens in a batch with its padding, at most (a longer sequence makes a batch of its own).
        progress: show a bar, with an estimate of the time left if the sequences can be counted.

    Raises:
        InputError: if a layer is not in the model, or no token of a side is to be averaged.
    """
    with evaluation_mode(model), progress_bar(progress) as bar:
        for contrast, sides in contrasts.items():
            for side, sequences in sides.items():
                total = len(sequences) if isinstance(sequences, Sized) else None
                task = bar.add_task(f"{contrast} contrast, {side} side", total=total)
                done = 0
                for batch in batches(sequences, batch_size, max_tokens_per_batch):
                    _feed(model, batch, fitters, layers, contrast, side)
                    done += len(batch)
                    bar.update(task, completed=done)
                if not summed(torch.tensor(done)):
                    raise InputError(
                        f"no token of the {side} side of the {contrast!r} contrast is to be averaged;\n"
                        "check that it has examples, and that max_length leaves something of them"
                    )
                bar.update(task, completed=total or done)  # sequences without a masked token were left out


def batches(
    sequences: Iterable[TokenizedSide], batch_size: int, max_tokens_per_batch: int
) -> Iterator[list[TokenizedSide]]:
    """Batches of sequences of like length, cut after their last masked token; those without one are left out.

    Within a window the longest come first, so that a batch too large for the memory fails at once.
    """
    usable = (_cut(sequence) for sequence in sequences if any(sequence.mask))
    while window := list(islice(usable, WINDOW)):
        window.sort(key=lambda sequence: len(sequence.input_ids), reverse=True)
        batch: list[TokenizedSide] = []
        for sequence in window:
            full = batch and (len(batch) + 1) * len(batch[0].input_ids) > max_tokens_per_batch
            if full or len(batch) == batch_size:
                yield batch
                batch = []
            batch.append(sequence)
        yield batch


def _feed(
    model: nn.Module,
    batch: Sequence[TokenizedSide],
    fitters: Sequence[Fitter],
    layers: Sequence[int],
    contrast: str,
    side: str,
) -> None:
    device = next(model.parameters()).device
    input_ids_BS, attention_mask_BS, positions_T = padded(batch)
    hidden_states = hidden_states_at(model, layers, input_ids_BS.to(device), attention_mask_BS.to(device))
    for layer, hidden_BSD in hidden_states.items():
        hidden_TD = hidden_BSD.flatten(0, 1).index_select(0, positions_T.to(hidden_BSD.device))
        for fitter in fitters:
            fitter.update(contrast, side, layer, hidden_TD)


def _cut(sequence: TokenizedSide) -> TokenizedSide:
    end = len(sequence.mask) - sequence.mask[::-1].index(True)
    return TokenizedSide(sequence.input_ids[:end], sequence.mask[:end])
