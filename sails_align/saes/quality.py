"""Measure the quality of an SAE on held-out tokens.

Shapes: N sequences, B batch, S positions, T content tokens, D d_model, F d_sae, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sails_align.data.tokens import TokenizedSide, batches_by_length, padded
from sails_align.models.hooks import Edit, edited, token_states
from sails_align.saes.load import ResidualSAE
from sails_align.saes.token_stream import FORWARD_TOKENS

LOSS_TOKENS = 20_000
"""Maximum number of content tokens for comparing losses, which takes three whole forward passes."""
LOGIT_TOKENS = 1024
"""Tokens in one of those forward passes: their logits are tokens x vocabulary."""


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


def evaluate_sae(model: nn.Module, sae: ResidualSAE, sequences: Sequence[TokenizedSide]) -> SAEQuality:
    """Measure an SAE of a causal language model at the masked tokens of some sequences."""
    layer = sae.info.layer
    count, active = 0, 0.0
    residual, squares = 0.0, 0.0
    sum_D = torch.zeros(sae.info.d_model, dtype=torch.float64)
    fired_F = torch.zeros(sae.info.d_sae, dtype=torch.bool)
    for batch in batches_by_length(sequences, FORWARD_TOKENS):
        states_TD = token_states(model, [layer], *padded(batch))[layer]
        for hidden_TD in states_TD.float().split(1024):
            acts_TF = sae.encode(hidden_TD)
            count += len(hidden_TD)
            active += (acts_TF != 0).sum().item()
            fired_F |= (acts_TF != 0).any(0).cpu()
            residual += (hidden_TD - sae.decode(acts_TF)).double().square().sum().item()
            squares += hidden_TD.double().square().sum().item()
            sum_D += hidden_TD.double().sum(0).cpu()
    total = squares - sum_D.square().sum().item() / count
    clean, spliced, ablated, loss_tokens = _losses(model, sae, sequences)
    return SAEQuality(
        explained_variance=1 - residual / total,
        l0=active / count,
        dead_fraction=1 - fired_F.double().mean().item(),
        eval_tokens=count,
        loss_clean=clean,
        loss_spliced=spliced,
        loss_zero_ablation=ablated,
        loss_recovered=(ablated - spliced) / (ablated - clean) if ablated > clean else None,
        loss_tokens=loss_tokens,
    )


@torch.no_grad()
def _losses(model: nn.Module, sae: ResidualSAE, sequences: Sequence[TokenizedSide]) -> tuple[float, float, float, int]:
    """Return the mean loss of content tokens (clean, spliced, zero-ablated), and their number."""
    device = next(model.parameters()).device
    sums = [0.0, 0.0, 0.0]
    count = 0
    totals_N = torch.tensor([sum(sequence.mask) for sequence in sequences]).cumsum(0)
    some = sequences[: int((totals_N <= LOSS_TOKENS).sum()) or 1]
    for batch in batches_by_length(some, LOGIT_TOKENS):
        input_ids_BS, attention_mask_BS, content_BS = (tensor.to(device) for tensor in padded(batch))
        targets_BS = input_ids_BS.masked_fill(~content_BS, -100)[:, 1:]
        count += int((targets_BS != -100).sum())
        reconstruct = partial(_replaced, content_BS, lambda hidden_TD: sae.decode(sae.encode(hidden_TD)))
        layer, ablate = sae.info.layer, partial(_replaced, content_BS, torch.zeros_like)
        for index, edits in enumerate(({}, {layer: reconstruct}, {layer: ablate})):
            with edited(model, edits):
                logits_BSV = model(input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False).logits
            losses = nn.functional.cross_entropy(
                logits_BSV[:, :-1].flatten(0, 1).float(), targets_BS.flatten(), ignore_index=-100, reduction="sum"
            )
            sums[index] += losses.item()
    clean, spliced, ablated = (total / max(count, 1) for total in sums)
    return clean, spliced, ablated, count


def _replaced(content_BS: Tensor, replacement: Edit, hidden_BSD: Tensor) -> Tensor:
    """Replace hidden states at the content positions; `replacement` takes and returns (T, D)."""
    hidden_BSD, content_BS = hidden_BSD.clone(), content_BS.to(hidden_BSD.device)
    hidden_BSD[content_BS] = replacement(hidden_BSD[content_BS]).to(hidden_BSD.dtype)
    return hidden_BSD
