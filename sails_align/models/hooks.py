"""Hidden states of chosen decoder blocks, read by forward hooks that are always removed.

Index: layer `l` means the output of block `l` (0-based), which is what an SAE with hook point
`blocks.{l}.hook_resid_post` reads. transformers' `hidden_states` cannot be used: its last one is after the final norm.

Shapes: B batch, S sequence, D d_model.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from sails_align.core.errors import InputError


class _StopForward(Exception):  # noqa: N818 -- it is no error
    """Ends a forward pass after the deepest captured block."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder blocks of a causal language model (or of its base model, or of a PEFT model).

    Raises:
        InputError: if the model has no `layers` list in its decoder, with the module lists that were found.
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
    """The decoder blocks of a model that has the layers.

    Raises:
        InputError: if a layer is not in the model, and as `decoder_layers`.
    """
    blocks = decoder_layers(model)
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise InputError(f"layer {layer} is out of range; choose 0 to {len(blocks) - 1}, the model's blocks")
    return blocks


@contextmanager
def capture(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Fill the yielded dict with the outputs (B, S, D) of the given blocks in every forward pass in the block.

    Raises:
        InputError: if a layer is not in the model.
    """
    blocks = check_layers(model, layers)
    hidden_states: dict[int, torch.Tensor] = {}

    def keep(layer: int):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            hidden_states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield hidden_states
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def hidden_states_at(
    model: nn.Module, layers: Sequence[int], input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> dict[int, torch.Tensor]:
    """Outputs (B, S, D) of the given blocks; blocks deeper than the deepest of them, and the head, are not run.

    Args:
        model: of any precision and on any device.
        layers: at least one.
        input_ids: (B, S).
        attention_mask: (B, S), 0 at padding.
    """

    def stop(module: nn.Module, args: tuple, output: object) -> None:
        raise _StopForward

    with capture(model, layers) as hidden_states:
        handle = decoder_layers(model)[max(layers)].register_forward_hook(stop)
        try:
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        except _StopForward:
            pass
        finally:
            handle.remove()
    return hidden_states


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode (no dropout) within the block, then restore its mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
