"""Say which units a decoder has: its channels, with the weights that read and write each.

A unit is a channel that linear modules read. Freezing it freezes the columns of the modules that read it (input
channels), and the rows of those that write it (output neurons). Modules that read the same channels share their units:
q, k and v do, and so do gate and up. Between the residual stream and these stands a norm, so that no linear module
writes their channels. With grouped queries several channels of o have one row of v, which is frozen with any of them.

Shapes: C channels, O outputs of a linear module.
"""

from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sails_align.core.errors import InputError
from sails_align.models.hooks import decoder_layers


@dataclass(frozen=True)
class Group:
    """Channels of a block that the same modules read."""

    name: str
    readers: tuple[str, ...]
    writers: tuple[str, ...] = ()


GROUPS = (
    Group("attention_input", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Group("heads", ("self_attn.o_proj",), ("self_attn.v_proj",)),
    Group("mlp_input", ("mlp.gate_proj", "mlp.up_proj")),
    Group("mlp_hidden", ("mlp.down_proj",), ("mlp.gate_proj", "mlp.up_proj")),
)
MODULES = tuple(path for group in GROUPS for path in group.readers)
"""Within a block: each reads the channels of one group."""


def key_of(block: int, group: Group) -> str:
    """Return what a group of a block is called in files."""
    return f"{block}.{group.name}"


def linear_of(block: nn.Module, path: str) -> nn.Linear:
    """Return a linear module of a block, without its adapter; raise `InputError` if there is none."""
    try:
        module = block.get_submodule(path)
    except AttributeError:
        module = None
    module = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if not isinstance(module, nn.Linear):
        raise InputError(
            f"a block of the model has no linear module {path}, so its units are not known;\n"
            "supported are the Gemma, Llama, Qwen and Mistral families of transformers, without experts"
        )
    return module


def n_channels(model: nn.Module) -> dict[str, int]:
    """Return the number of units in each group of each block; raise `InputError` for an unknown architecture."""
    return {
        key_of(index, group): linear_of(block, group.readers[0]).in_features
        for index, block in enumerate(decoder_layers(model))
        for group in GROUPS
        if [linear_of(block, path) for path in (*group.readers, *group.writers)]
    }


def rows_of(chosen_C: Tensor, n_rows: int, head_dim: int) -> Tensor:
    """Return the rows (O,) of a writer that write any of the chosen channels (C,).

    With grouped queries O is less than C, and each head of the writer has several heads of channels.
    """
    if len(chosen_C) == n_rows:
        return chosen_C
    return chosen_C.view(n_rows // head_dim, -1, head_dim).any(1).flatten()


def columns_and_rows(block: nn.Module, path: str, chosen: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the chosen columns (C,) and rows (O,) of a linear module, by group; rows None if it writes no channels."""
    (read,) = [group for group in GROUPS if path in group.readers]
    written = [group for group in GROUPS if path in group.writers]
    if not written:
        return chosen[read.name], None
    module = linear_of(block, path)
    head_dim: int = getattr(block.get_submodule("self_attn"), "head_dim", 1)
    return chosen[read.name], rows_of(chosen[written[0].name], module.out_features, head_dim)
