"""What goes into a model's linear layers, read by forward hooks that are always removed.

Shapes: B batch, S sequence, T tokens, I inputs of a linear layer.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


@contextmanager
def watched_inputs(model: nn.Module, modules: Iterable[str], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `seen` with a module's name and its input (B, S, I) in every forward pass within the block."""

    def hook(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(hook, name)) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_products(sums: dict[str, Tensor], name: str, rows_TI: Tensor) -> None:
    """Add the outer products of rows to the sum (I, I) of that name, in float64 and in place."""
    exact_TI = rows_TI.double()
    if name not in sums:
        sums[name] = exact_TI.new_zeros(exact_TI.shape[1], exact_TI.shape[1])
    sums[name].addmm_(exact_TI.T, exact_TI)
