"""Measure the effect of each SAE latent on refusing harmful requests, by activation times gradient.

    effect_i = mean over harmful requests of the sum over tokens t of  a_i(t) * (dM / dh(t) . W_i)

where M is the refusal margin (`margin`), h the output of the SAE's block, a_i the activation of latent i and W_i its
decoder direction. To first order this is how much the margin loses if the latent is taken out of those tokens, so it is
positive for what makes refusal likelier. This is attribution patching to an ablated latent (Syed et al. 2023, arXiv
2310.10348; Marks et al. 2024, arXiv 2403.19647, equation 3). The score of SAILS is a difference of mean
activations instead: it is as high for latents that differ but do nothing.

One forward pass of the whole model and one backward pass to the first SAE's block give the gradients of all layers.
Everything streams, as in `forward`.

Shapes: T tokens looked at, D d_model, F d_sae.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sails_align.core.distributed import summed
from sails_align.core.errors import InputError
from sails_align.core.progress import progress_bar
from sails_align.data.tokens import TokenizedSide, batches_by_length, padded
from sails_align.models.hooks import at_tokens, capture_with_graph, evaluation_mode
from sails_align.saes.load import ResidualSAE
from sails_align.subspace.forward import WINDOW
from sails_align.subspace.margin import SIGNS, BegunResponse, margin_term
from sails_align.subspace.selection import chunk_size
from sails_align.subspace.statistics import Key, SideSums, TokenStats


class EffectFitter:
    """Sum up the effects of every latent on the terms of the margin. Memory does not depend on the number of requests.

    In its `TokenStats`, `n_tokens` counts requests, and the mean is the effect.
    """

    def __init__(self, saes: Mapping[int, ResidualSAE]) -> None:
        """Take the SAE of each layer."""
        self._saes = dict(saes)
        self._sums: dict[Key, SideSums] = {}

    @torch.no_grad()
    def update(
        self, contrast: str, side: str, layer: int, hidden_TD: Tensor, gradient_TD: Tensor, n_requests: int
    ) -> None:
        """Add the tokens of some requests: hidden states, and the gradients of the margin's term at them."""
        sae, key = self._saes[layer], (contrast, layer, side)
        precise = torch.promote_types(hidden_TD.dtype, torch.float32)
        chunk = chunk_size(hidden_TD, sae.info.d_sae)
        for part_TD, slope_TD in zip(hidden_TD.split(chunk), gradient_TD.split(chunk), strict=True):
            acts_TF = sae.encode(part_TD.to(precise))
            slope_TF = sae.decode_gradient(acts_TF, slope_TD.to(acts_TF.device, precise))
            effect_F = (acts_TF * slope_TF).sum(0).double()
            if key not in self._sums:
                self._sums[key] = SideSums(torch.tensor(0), torch.zeros_like(effect_F))
            self._sums[key].sum.add_(effect_F)
        self._sums[key].n_tokens.add_(n_requests)

    def result(self) -> TokenStats:
        """Return what was added so far; the fitter can go on."""
        return TokenStats({key: sums.copy() for key, sums in self._sums.items()})


def attribute(
    model: nn.Module,
    sides: Mapping[str, Iterable[BegunResponse]],
    contrasts: Sequence[str],
    fitter: EffectFitter,
    layers: Sequence[int],
    *,
    batch_size: int = 16,
    max_tokens_per_batch: int = 2048,
    progress: bool = False,
) -> None:
    """Feed hidden states and gradients at the tokens that are looked at to a fitter.

    Attention is computed by plain products: the backward passes of fused kernels add in any order on a GPU, so their
    sums would not repeat.

    Args:
        model: a causal language model with its head; its weights get no gradients.
        sides: `aligned` and `unaligned`: requests with the first tokens of chosen and of rejected responses, read
            lazily and once. With several processes, each gives its share.
        contrasts: whose tokens are looked at, one or more of `BegunResponse.looked_at`.
        fitter: with SAEs of the layers.
        layers: the blocks whose outputs are wanted, at least one.
        batch_size: see `batches_by_length`.
        max_tokens_per_batch: see there.
        progress: show a bar.

    Raises:
        InputError: if a layer is not in the model, or a side has no response.
    """
    with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH), progress_bar(progress) as bar:
        for side, sequences in sides.items():
            total = len(sequences) if isinstance(sequences, Sized) else None
            task = bar.add_task(f"effects on refusal, {side} responses", total=total)
            done = 0
            for batch in _batches(sequences, batch_size, max_tokens_per_batch):
                states = states_and_gradients(model, layers, batch, SIGNS[side])
                for contrast in contrasts:
                    mask_BS = padded([TokenizedSide(of.input_ids, of.looked_at[contrast]) for of in batch])[2]
                    for layer, (hidden_BSD, gradient_BSD) in states.items():
                        at = at_tokens(hidden_BSD, mask_BS), at_tokens(gradient_BSD, mask_BS)
                        fitter.update(contrast, side, layer, *at, len(batch))
                done += len(batch)
                bar.update(task, completed=done)
            if not summed(torch.tensor(done)):
                raise InputError(
                    f"no {side} response to a harmful request has a token within max_length;\n"
                    "raise --max_length, or use --score mean_diff"
                )
            bar.update(task, completed=total or done)  # requests whose response was cut off were left out


def states_and_gradients(
    model: nn.Module, layers: Sequence[int], batch: Sequence[TokenizedSide], sign: float
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return hidden states and the gradients of the margin's term with respect to them, each (B, S, D), by layer."""
    with capture_with_graph(model, layers) as hidden_states:
        term = margin_term(model, batch, sign)
    gradients = torch.autograd.grad(term, [hidden_states[layer] for layer in layers])
    return {layer: (hidden_states[layer].detach(), of) for layer, of in zip(layers, gradients, strict=True)}


def _batches(sequences: Iterable[BegunResponse], batch_size: int, max_tokens: int) -> Iterator[list[BegunResponse]]:
    usable = (sequence for sequence in sequences if any(sequence.mask))
    while window := list(islice(usable, WINDOW)):
        yield from batches_by_length(window, max_tokens, batch_size)
