"""Run the contrasts through the model and feed the fitters, with one truncated forward pass per batch.

Everything streams. At any time a window of sequences, one batch and the fitters' sums are in memory, so memory does
not depend on the number of examples.

Shapes: T averaged tokens of a batch, D d_model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice

import torch
from torch import nn

from sails_align.core.distributed import summed
from sails_align.core.errors import InputError
from sails_align.core.progress import progress_bar
from sails_align.data.tokens import TokenizedSide, batches_by_length, padded
from sails_align.models.hooks import evaluation_mode, token_states
from sails_align.subspace.statistics import Fitter

WINDOW = 512
"""Number of sequences sorted by length together, so that batches need little padding."""


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

    Blocks deeper than the deepest layer are not run, nor are the tokens after a sequence's last masked one: in a causal
    model nothing that is averaged depends on them.

    Args:
        model: a decoder on one or several devices, with or without its head (see `load_truncated`).
        contrasts: contrast -> side -> sequences, read lazily and once. With several processes, each gives its share.
        fitters: all are given the same hidden states, in the model's precision.
        layers: the blocks whose outputs are wanted, at least one.
        batch_size: see `batches_by_length`.
        max_tokens_per_batch: see there.
        progress: show a bar.

    Raises:
        InputError: if a layer is not in the model, or a side has no tokens to average.
    """
    with evaluation_mode(model), progress_bar(progress) as bar:
        for contrast, sides in contrasts.items():
            for side, sequences in sides.items():
                total = len(sequences) if isinstance(sequences, Sized) else None
                task = bar.add_task(f"{contrast} contrast, {side} side", total=total)
                done = 0
                for batch in batches(sequences, batch_size, max_tokens_per_batch):
                    for layer, hidden_TD in token_states(model, layers, *padded(batch)).items():
                        for fitter in fitters:
                            fitter.update(contrast, side, layer, hidden_TD)
                    done += len(batch)
                    bar.update(task, completed=done)
                if not summed(torch.tensor(done)):
                    raise InputError(
                        f"the {side} side of the {contrast!r} contrast has no tokens to average;\n"
                        "check that it has examples, and that max_length leaves something of them"
                    )
                bar.update(task, completed=total or done)  # sequences without a masked token were left out


def batches(
    sequences: Iterable[TokenizedSide], batch_size: int, max_tokens_per_batch: int
) -> Iterator[list[TokenizedSide]]:
    """Yield batches of sequences of like length, cut after their last masked token; those without one are left out."""
    usable = (_cut(sequence) for sequence in sequences if any(sequence.mask))
    while window := list(islice(usable, WINDOW)):
        yield from batches_by_length(window, max_tokens_per_batch, batch_size)


def _cut(sequence: TokenizedSide) -> TokenizedSide:
    end = len(sequence.mask) - sequence.mask[::-1].index(True)
    return TokenizedSide(sequence.input_ids[:end], sequence.mask[:end])
