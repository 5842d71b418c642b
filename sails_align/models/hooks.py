"""Hidden states of chosen decoder blocks, read by forward hooks that are always removed.

Index: layer `l` means the output of block `l` (0-based), which is what an SAE with hook point
`blocks.{l}.hook_resid_post` reads. transformers' `hidden_states` cannot be used: its last one is after the final norm.

Shapes: B batch, S sequence, T tokens in a mask, D d_model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from sails_align.core.errors import InputError
from sails_align.models.threads import fitting_threads

HiddenEdit = Callable[[Tensor], Tensor]
"""Of a block's output (B, S, D)."""


class _StopForward(Exception):  # noqa: N818 -- it is no error
    """Ends a forward pass after the deepest captured block."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder blocks of a causal language model, its base model, or a PEFT model of it.

    Raises `InputError`, with the module lists that were found, if its decoder has no list `layers`.
    """
    # Not by `hasattr(model, "peft_config")`: PEFT sets that on the base model too.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = base.get_decoder() if isinstance(base, PreTrainedModel) else base
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        found = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise InputError(
            f"{type(base).__name__} has no decoder blocks at `layers` (module lists found: {found or 'none'});\n"
            "supported are the Gemma, Llama, Qwen and Mistral families of transformers"
        )
    return layers


def check_layers(model: nn.Module, layers: Iterable[int]) -> nn.ModuleList:
    """Return the decoder blocks; raise `InputError` if a layer is not one of them, and as `decoder_layers`."""
    blocks = decoder_layers(model)
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise InputError(f"layer {layer} is out of range; choose 0 to {len(blocks) - 1}, the model's blocks")
    return blocks


@contextmanager
def edited(model: nn.Module, edits: Mapping[int, HiddenEdit]) -> Iterator[None]:
    """Replace the output of each given block by its edit of it, within the `with` block."""

    def hook(edit: HiddenEdit, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    blocks = check_layers(model, edits)
    handles = [blocks[layer].register_forward_hook(partial(hook, edit)) for layer, edit in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Fill the yielded dict with the outputs (B, S, D) of the given blocks in every forward pass."""
    hidden_states: dict[int, Tensor] = {}

    def keep(layer: int, hidden_BSD: Tensor) -> Tensor:
        hidden_states[layer] = hidden_BSD
        return hidden_BSD

    with edited(model, {layer: partial(keep, layer) for layer in layers}):
        yield hidden_states


@contextmanager
def capture_with_graph(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Do as `capture`, in a graph for gradients that begins at the first of the layers.

    Neither the blocks up to that one nor any weight is in the graph, so a backward pass ends there.
    """
    hidden_states: dict[int, Tensor] = {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def keep(layer: int, hidden_BSD: Tensor) -> Tensor:
        hidden_states[layer] = hidden_BSD.detach().requires_grad_() if layer == min(layers) else hidden_BSD
        return hidden_states[layer]

    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad(), edited(model, {layer: partial(keep, layer) for layer in layers}):
            yield hidden_states
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def continued_from(model: nn.Module, layer: int, hidden_BSD: Tensor) -> Iterator[None]:
    """Let forward passes within the block begin at a hidden state: the output of block `layer` (B, S, D).

    That block and those before it are not run. The inputs must be those that the hidden state belongs to.
    """
    blocks = check_layers(model, [layer])[: layer + 1]
    own = [vars(block).get("forward") for block in blocks]  # such as that of a model spread over devices
    try:
        for block in blocks:
            block.forward = lambda *args, **kwargs: hidden_BSD
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


@torch.no_grad()
def hidden_states_at(
    model: nn.Module, layers: Sequence[int], input_ids_BS: Tensor, attention_mask_BS: Tensor
) -> dict[int, Tensor]:
    """Do as `states_up_to`, without gradients."""
    return states_up_to(model, layers, input_ids_BS, attention_mask_BS)


def states_up_to(
    model: nn.Module, layers: Sequence[int], input_ids_BS: Tensor, attention_mask_BS: Tensor
) -> dict[int, Tensor]:
    """Return the outputs (B, S, D) of the given blocks; neither deeper blocks nor the head are run.

    The inputs are moved to the model's device; the attention mask is 0 at padding.
    """

    def stop(hidden_BSD: Tensor) -> Tensor:
        raise _StopForward

    device = next(model.parameters()).device
    inputs = {"input_ids": input_ids_BS.to(device), "attention_mask": attention_mask_BS.to(device)}
    with capture(model, layers) as hidden_states, edited(model, {max(layers): stop}), suppress(_StopForward):
        model(**inputs, use_cache=False)
    return hidden_states


def token_states(
    model: nn.Module, layers: Sequence[int], input_ids_BS: Tensor, attention_mask_BS: Tensor, mask_BS: Tensor
) -> dict[int, Tensor]:
    """Return the outputs (T, D) of the given blocks at the tokens in a mask, on each block's device."""
    hidden_states = hidden_states_at(model, layers, input_ids_BS, attention_mask_BS)
    return {layer: at_tokens(hidden_BSD, mask_BS) for layer, hidden_BSD in hidden_states.items()}


def at_tokens(values_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Return the rows (T, D) of the tokens in a mask."""
    positions_T = mask_BS.flatten().nonzero().squeeze(1)
    return values_BSD.flatten(0, 1).index_select(0, positions_T.to(values_BSD.device))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode (no dropout), on `fitting_threads`, within the block; then restore both."""
    was_training = model.training
    model.eval()
    try:
        with fitting_threads(model):
            yield
    finally:
        model.train(was_training)
