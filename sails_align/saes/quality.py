"""Measure the quality of an SAE on held-out tokens.

Shapes: B batch, S positions, T content tokens, D d_model, F d_sae, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sails_align.models.hooks import decoder_layers, hidden_states_at
from sails_align.saes.load import ResidualSAE
from sails_align.saes.token_stream import FORWARD_TOKENS, TokenCorpus

LOSS_TOKENS = 20_000
"""Content tokens over which the language model's loss is compared, at most: it takes three whole forward passes."""
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
    """The language model's next-token loss, in nats."""
    loss_spliced: float
    """With the layer's output replaced by the SAE's reconstruction."""
    loss_zero_ablation: float
    """With it replaced by zero."""
    loss_recovered: float | None
    """(zero ablation - spliced) / (zero ablation - clean); None if zero ablation does not raise the loss."""
    loss_tokens: int


def evaluate_sae(model: nn.Module, sae: ResidualSAE, corpus: TokenCorpus, windows: Sequence[int]) -> SAEQuality:
    """Measure an SAE of a causal language model on some windows of a corpus."""
    layer = sae.info.layer
    device = next(model.parameters()).device
    count, active = 0, 0.0
    residual, squares = 0.0, 0.0
    sum_D = torch.zeros(sae.info.d_model, dtype=torch.float64)
    fired_F = torch.zeros(sae.info.d_sae, dtype=torch.bool)
    for batch in corpus.batches(windows, FORWARD_TOKENS):
        input_ids_BS, attention_mask_BS, content_BS = (tensor.to(device) for tensor in corpus.padded(batch))
        hidden_BSD = hidden_states_at(model, [layer], input_ids_BS, attention_mask_BS)[layer]
        for hidden_TD in hidden_BSD[content_BS.to(hidden_BSD.device)].float().split(1024):
            acts_TF = sae.encode(hidden_TD)
            count += len(hidden_TD)
            active += (acts_TF != 0).sum().item()
            fired_F |= (acts_TF != 0).any(0).cpu()
            residual += (hidden_TD - sae.decode(acts_TF)).double().square().sum().item()
            squares += hidden_TD.double().square().sum().item()
            sum_D += hidden_TD.double().sum(0).cpu()
    total = squares - sum_D.square().sum().item() / count
    clean, spliced, ablated, loss_tokens = _losses(model, sae, corpus, windows)
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
def _losses(
    model: nn.Module, sae: ResidualSAE, corpus: TokenCorpus, windows: Sequence[int]
) -> tuple[float, float, float, int]:
    """Mean loss of content tokens: clean, spliced, zero-ablated; and how many they are."""
    device = next(model.parameters()).device
    edits: list[Callable[[Tensor], Tensor] | None] = [
        None,
        lambda hidden_TD: sae.decode(sae.encode(hidden_TD)),
        torch.zeros_like,
    ]
    sums = [0.0, 0.0, 0.0]
    count = 0
    totals_W = corpus.content_counts()[torch.as_tensor(windows)].cumsum(0)
    some = windows[: int((totals_W <= LOSS_TOKENS).sum()) or 1]
    for batch in corpus.batches(some, LOGIT_TOKENS):
        input_ids_BS, attention_mask_BS, content_BS = (tensor.to(device) for tensor in corpus.padded(batch))
        targets_BS = input_ids_BS.masked_fill(~content_BS, -100)[:, 1:]
        count += int((targets_BS != -100).sum())
        for index, edit in enumerate(edits):
            with spliced(model, sae.info.layer, edit, content_BS):
                logits_BSV = model(input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False).logits
            losses = nn.functional.cross_entropy(
                logits_BSV[:, :-1].flatten(0, 1).float(), targets_BS.flatten(), ignore_index=-100, reduction="sum"
            )
            sums[index] += losses.item()
    clean, with_sae, ablated = (total / max(count, 1) for total in sums)
    return clean, with_sae, ablated, count


@contextmanager
def spliced(
    model: nn.Module, layer: int, edit: Callable[[Tensor], Tensor] | None, content_BS: Tensor
) -> Iterator[None]:
    """Replace a layer's output (T, D) at the content positions by `edit` of it, within the block."""

    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        if edit is None:
            return None
        hidden_BSD = (output[0] if isinstance(output, tuple) else output).clone()
        mask_BS = content_BS.to(hidden_BSD.device)
        hidden_BSD[mask_BS] = edit(hidden_BSD[mask_BS]).to(hidden_BSD.dtype)
        return (hidden_BSD, *output[1:]) if isinstance(output, tuple) else hidden_BSD

    handle = decoder_layers(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
