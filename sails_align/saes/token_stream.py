"""Turn texts into token sequences and buffers of hidden states, in a reproducible order.

Token ids are held in memory (4 bytes each); hidden states never are, beyond one buffer.

Shapes: N all tokens, W windows (sequences), T content tokens, D d_model.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.data.tokens import TokenizedSide, batches_by_length, padded
from sails_align.models.hooks import token_states

logger = logging.getLogger(__name__)

TEXTS_AT_ONCE = 256
HELD_OUT = 0.1
"""Maximum share of the windows that is held out."""
FORWARD_TOKENS = 8192
"""Tokens, with padding, in one forward pass of the model."""


@dataclass(frozen=True)
class TokenCorpus:
    """Windows of at most `context_size` tokens, one after another."""

    ids: Tensor
    """(N,), int32"""
    content: Tensor
    """(N,): whether a token is content, that is, not special."""
    ends: Tensor
    """(W,): where each window ends in `ids`."""
    prepend_bos: bool
    """Whether every window starts with BOS."""

    def __len__(self) -> int:
        return len(self.ends)

    def content_counts(self) -> Tensor:
        """Return the number of content tokens in each window. (W,)"""
        totals_W = self.content.cumsum(0)[self.ends - 1]
        return totals_W.diff(prepend=totals_W.new_zeros(1))

    def tokens_of(self, window: int) -> bytes:
        """Return what tells the tokens of a window from those of others."""
        start = int(self.ends[window - 1]) if window else 0
        return self.ids[start : int(self.ends[window])].numpy().tobytes()

    def sequences(self, windows: Iterable[int]) -> list[TokenizedSide]:
        """Return some windows, with content tokens as their mask."""
        spans = [slice(int(self.ends[window - 1]) if window else 0, int(self.ends[window])) for window in windows]
        return [TokenizedSide(self.ids[span].tolist(), self.content[span].tolist()) for span in spans]


def read_corpus(
    texts: Iterable[str] | Iterable[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_tokens: int,
    context_size: int,
    advance: Callable[[int], object] = lambda count: None,
) -> TokenCorpus:
    """Read texts or sequences of token ids until there are `n_tokens` content tokens, or they end.

    A text is cut into windows of `context_size` tokens, each with BOS in front if the tokenizer has one. Token ids are
    cut as they are. `advance` is called with the number of content tokens read since the last call. Raises `InputError`
    if a row is neither text nor token ids, or if there is not a single content token.
    """
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int32)
    bos = tokenizer.bos_token_id
    windows: list[Tensor] = []
    content: list[Tensor] = []
    count = 0
    with_bos = True
    rows = iter(enumerate(texts))
    while count < n_tokens and (some := list(islice(rows, TEXTS_AT_ONCE))):
        before = count
        sequences, are_texts = _token_ids(some, tokenizer)
        prefix = [bos] if are_texts and bos is not None else []
        step = context_size - len(prefix)
        for ids in sequences:
            for start in range(0, len(ids), step):
                window = torch.tensor(prefix + list(ids[start : start + step]), dtype=torch.int32)
                windows.append(window)
                content.append(~torch.isin(window, special))
                count += int(content[-1].sum())
                with_bos = with_bos and bos is not None and int(window[0]) == bos
        advance(count - before)
    if count == 0:
        raise InputError("no text to train on: the dataset is empty, or all its rows are; check its text column")
    ends_W = torch.tensor([len(window) for window in windows]).cumsum(0)
    return TokenCorpus(torch.cat(windows), torch.cat(content), ends_W, with_bos)


def _token_ids(
    rows: Sequence[tuple[int, str | Sequence[int]]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Sequence[int]], bool]:
    """Return the token ids of numbered rows, and whether they are texts."""
    are_texts = isinstance(rows[0][1], str)
    for index, row in rows:
        if not (isinstance(row, str) if are_texts else _is_token_ids(row)):
            wanted = "text" if are_texts else "text, or token ids"
            raise InputError(
                f"row {index} is {type(row).__name__} ({str(row)[:40]!r}), not {wanted}: choose the column that holds "
                "the text, and leave out its empty rows"
            )
    values: Any = [row for _, row in rows]
    return (tokenizer(values, add_special_tokens=False, verbose=False)["input_ids"] if are_texts else values), are_texts


def _is_token_ids(row: object) -> bool:
    return isinstance(row, Sequence) and not isinstance(row, str) and all(isinstance(token, int) for token in row)


def split_windows(corpus: TokenCorpus, *, eval_tokens: int, least: int, seed: int) -> tuple[Tensor, list[int]]:
    """Hold out windows at random, until they hold `eval_tokens` content tokens or are a tenth of the windows.

    Of the held-out windows, those whose tokens are trained on as well are left out, unless all are.
    Returns the windows to train on and the held-out ones. Raises `InputError` if fewer than `least` content tokens are
    left to train on.
    """
    order_W = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(seed))
    counts_W = corpus.content_counts()[order_W]
    count = min(int((counts_W.cumsum(0) < eval_tokens).sum()) + 1, max(1, int(HELD_OUT * len(corpus))))
    left = int(counts_W[count:].sum())
    if left < least or not counts_W[:count].any():
        raise InputError(
            f"too little text: {left} tokens to train on after holding out a part, less than a batch of {least};\n"
            "give more text or a smaller batch_size"
        )
    train_W, held_out = order_W[count:], order_W[:count].tolist()
    held_out_ids = {corpus.tokens_of(window) for window in held_out}
    known = held_out_ids & {corpus.tokens_of(window) for window in train_W.tolist()}
    new = [window for window in held_out if corpus.tokens_of(window) not in known]
    if known:
        n = len(held_out) - len(new)
        so = "they are not measured on" if new else "no other text is held out, so the measures are not of new text"
        level = logging.INFO if new else logging.WARNING
        logger.log(level, "%d of %d held-out texts are trained on, too: %s", n, len(held_out), so)
    return train_W, new or held_out


def buffers(corpus: TokenCorpus, windows_W: Tensor, tokens: int, seed: int) -> Iterator[list[int]]:
    """Yield windows for one buffer after another, endlessly, each with at least `tokens` content tokens.

    They are reshuffled every epoch. The order depends on the arguments alone, so a stream can be resumed at any buffer.
    """
    counts = corpus.content_counts().tolist()
    generator = torch.Generator().manual_seed(seed)
    buffer: list[int] = []
    held = 0
    while True:
        for window in windows_W[torch.randperm(len(windows_W), generator=generator)].tolist():
            buffer.append(window)
            held += counts[window]
            if held >= tokens:
                yield buffer
                buffer, held = [], 0


def hidden_states_of(model: nn.Module, layers: Sequence[int], sequences: Sequence[TokenizedSide]) -> dict[int, Tensor]:
    """Return block outputs (T, D) at the masked tokens, in the model's precision, on each block's device.

    One forward pass serves all layers; blocks after the deepest of them are not run.
    """
    parts = [token_states(model, layers, *padded(batch)) for batch in batches_by_length(sequences, FORWARD_TOKENS)]
    return {layer: torch.cat([part.pop(layer) for part in parts]) for layer in layers}
