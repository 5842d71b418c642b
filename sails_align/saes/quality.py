"""Measure the quality of SAEs on held-out tokens.

Shapes: B batch, S positions, T content tokens, D d_model, F d_sae, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sails_align.data.tokens import TokenizedSide, batches_by_length, padded
from sails_align.models.hooks import capture, continued_from, token_states
from sails_align.saes.load import ResidualSAE
from sails_align.saes.token_stream import FORWARD_TOKENS

LOSS_TOKENS = 5_000
"""Maximum number of content tokens for comparing losses."""
LOGIT_TOKENS = 1024
"""Tokens in one of those forward passes: their logits are tokens x vocabulary."""
MASSIVE = 10
"""A token's activation is massive if its norm is more than so many times the median (arXiv 2402.17762).

A few such tokens hold nearly all of the variance, which then says little about the others."""


@dataclass(frozen=True)
class SAEQuality:
    """Measured on held-out content tokens (no special tokens, no padding)."""

    explained_variance: float
    """1 - residual sum of squares / total sum of squares around the mean."""
    l0: float
    """Mean number of active latents for each token."""
    dead_fraction: float
    """Share of latents that fire on none of the `eval_tokens`."""
    eval_tokens: int
    loss_clean: float
    """Next-token loss of the language model, in nats."""
    loss_spliced: float
    """The loss with the layer's output replaced by the SAE's reconstruction."""
    loss_zero_ablation: float
    """The loss with the layer's output replaced by zero."""
    loss_recovered: float | None
    """(zero ablation - spliced) / (zero ablation - clean); None if zero ablation does not raise the loss."""
    loss_tokens: int
    explained_variance_typical: float | None = None
    """Explained variance without the tokens of massive activations (`MASSIVE`); None in reports of older versions."""
    n_massive: int = 0
    """Number of tokens with massive activations, which `explained_variance_typical` leaves out."""
    massive_tokens: dict[str, int] = field(default_factory=dict)
    """Which tokens these are most often, with how often."""


def evaluate_saes(
    model: nn.Module,
    saes: Mapping[int, ResidualSAE],
    sequences: Sequence[TokenizedSide],
    *,
    advance: Callable[[int], object] = lambda count: None,
    name_of: Callable[[int], str] = str,
) -> dict[int, SAEQuality]:
    """Measure the SAEs of some layers of a causal language model, at the masked tokens of some sequences.

    The hidden states and the clean loss of all layers come from one forward pass. The passes with a layer replaced
    begin at that layer.

    Args:
        model: the language model.
        saes: by layer.
        sequences: with masks of their content tokens.
        advance: called with the number of tokens measured since the last call; in all `n_measured` of the sequences.
        name_of: the name of a token id in `massive_tokens`.
    """
    fits = {layer: _Fit(sae) for layer, sae in saes.items()}
    with torch.no_grad():
        for batch in batches_by_length(sequences, FORWARD_TOKENS):
            tensors = padded(batch)
            states = token_states(model, list(saes), *tensors)
            for layer, fit in fits.items():
                fit.add(states[layer].float(), tensors[0][tensors[2]])
            advance(sum(sum(sequence.mask) for sequence in batch))
        losses = _losses(model, saes, _for_losses(sequences), advance)
    return {layer: SAEQuality(**fit.result(name_of), **losses[layer]) for layer, fit in fits.items()}


def n_measured(sequences: Sequence[TokenizedSide]) -> int:
    """Return the number of tokens that `evaluate_saes` measures, for a progress bar."""
    return sum(sum(sequence.mask) for some in (sequences, _for_losses(sequences)) for sequence in some)


def _for_losses(sequences: Sequence[TokenizedSide]) -> Sequence[TokenizedSide]:
    totals_N = torch.tensor([sum(sequence.mask) for sequence in sequences]).cumsum(0)
    return sequences[: int((totals_N <= LOSS_TOKENS).sum()) or 1]


class _Variance:
    """Add up the explained variance of batches of tokens."""

    def __init__(self, d_model: int) -> None:
        self.count, self.residual, self.squares = 0, 0.0, 0.0
        self.sum_D = torch.zeros(d_model, dtype=torch.float64)

    def add(self, hidden_TD: Tensor, residual_T: Tensor) -> None:
        self.count += len(hidden_TD)
        self.residual += residual_T.sum().item()
        self.squares += hidden_TD.double().square().sum().item()
        self.sum_D += hidden_TD.double().sum(0).cpu()

    def explained(self) -> float:
        total = self.squares - self.sum_D.square().sum().item() / self.count
        return 1 - self.residual / total


class _Fit:
    """Measure how well an SAE reconstructs hidden states, and how sparse it is."""

    def __init__(self, sae: ResidualSAE) -> None:
        self.sae, self.active = sae, 0.0
        self.all, self.typical = _Variance(sae.info.d_model), _Variance(sae.info.d_model)
        self.fired_F = torch.zeros(sae.info.d_sae, dtype=torch.bool)
        self.largest: float | None = None
        self.massive: Counter[int] = Counter()

    def add(self, hidden_TD: Tensor, ids_T: Tensor) -> None:
        if self.largest is None:
            self.largest = MASSIVE * hidden_TD.norm(dim=1).median().item()
        for some_TD, some_T in zip(hidden_TD.split(1024), ids_T.split(1024), strict=True):
            acts_TF = self.sae.encode(some_TD)
            self.active += (acts_TF != 0).sum().item()
            self.fired_F |= (acts_TF != 0).any(0).cpu()
            residual_T = (some_TD - self.sae.decode(acts_TF)).double().square().sum(1)
            is_massive_T = some_TD.norm(dim=1) > self.largest
            self.massive.update(some_T[is_massive_T.cpu()].tolist())
            self.all.add(some_TD, residual_T)
            self.typical.add(some_TD[~is_massive_T], residual_T[~is_massive_T])

    def result(self, name_of: Callable[[int], str]) -> dict[str, Any]:
        count = self.all.count
        return {
            "explained_variance": self.all.explained(),
            "explained_variance_typical": self.typical.explained(),
            "n_massive": count - self.typical.count,
            "massive_tokens": {name_of(token): n for token, n in self.massive.most_common(5)},
            "l0": self.active / count,
            "dead_fraction": 1 - self.fired_F.double().mean().item(),
            "eval_tokens": count,
        }


def _losses(
    model: nn.Module,
    saes: Mapping[int, ResidualSAE],
    sequences: Sequence[TokenizedSide],
    advance: Callable[[int], object],
) -> dict[int, dict[str, Any]]:
    """Return the mean loss of content tokens of each layer: clean, spliced, zero-ablated, and what is recovered."""
    device = next(model.parameters()).device
    clean, count = 0.0, 0
    spliced, ablated = dict.fromkeys(saes, 0.0), dict.fromkeys(saes, 0.0)
    for batch in batches_by_length(sequences, LOGIT_TOKENS):
        input_ids_BS, attention_mask_BS, content_BS = (tensor.to(device) for tensor in padded(batch))
        targets_BS = input_ids_BS.masked_fill(~content_BS, -100)[:, 1:]
        inputs = {"input_ids": input_ids_BS, "attention_mask": attention_mask_BS, "use_cache": False}
        count += int((targets_BS != -100).sum())
        with capture(model, list(saes)) as states:
            clean += _loss(model, inputs, targets_BS)
        for layer, sae in saes.items():
            hidden_BSD = states[layer]
            content = content_BS.to(hidden_BSD.device)
            for sums, replacement in ((spliced, sae.decode(sae.encode(hidden_BSD[content]))), (ablated, 0)):
                replaced_BSD = hidden_BSD.clone()
                replaced_BSD[content] = replacement.to(hidden_BSD.dtype) if isinstance(replacement, Tensor) else 0
                with continued_from(model, layer, replaced_BSD):
                    sums[layer] += _loss(model, inputs, targets_BS)
        advance(sum(sum(sequence.mask) for sequence in batch))
    return {layer: _recovered(clean, spliced[layer], ablated[layer], count) for layer in saes}


def _loss(model: nn.Module, inputs: Mapping[str, object], targets_BS: Tensor) -> float:
    logits_BSV = model(**inputs).logits
    losses = nn.functional.cross_entropy(
        logits_BSV[:, :-1].flatten(0, 1).float(), targets_BS.flatten(), ignore_index=-100, reduction="sum"
    )
    return losses.item()


def _recovered(clean: float, spliced: float, ablated: float, count: int) -> dict[str, Any]:
    clean, spliced, ablated = (total / max(count, 1) for total in (clean, spliced, ablated))
    return {
        "loss_clean": clean,
        "loss_spliced": spliced,
        "loss_zero_ablation": ablated,
        "loss_recovered": (ablated - spliced) / (ablated - clean) if ablated > clean else None,
        "loss_tokens": count,
    }
