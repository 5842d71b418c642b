"""Run a model one decoder block at a time, so that the inputs of one block's layers are in memory at once, and no more.

A block may be changed before its outputs are kept: then all later inputs are those of the changed model.

Shapes: B batch, S sequence, T tokens in a mask, D d_model, I inputs of a linear layer.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext

from torch import Tensor, nn

from sails_align.models.hooks import at_tokens, continued_from, decoder_layers, evaluation_mode, hidden_states_at
from sails_align.models.inputs import watched_inputs

Batch = tuple[Tensor, Tensor, Tensor]
"""Token ids, attention mask, and the tokens that are looked at, each (B, S), padded on the right."""


class BlockByBlock:
    """Hold the hidden states before a block, of some batches, and go from block to block.

    Args:
        model: with blocks that `decoder_layers` finds.
        batches: what is run.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        self._names = {id(module): name for name, module in model.named_modules()}
        self._hidden: list[Tensor | None] = [None] * len(batches)
        self.block = 0
        """The block that comes next."""

    @property
    def n_blocks(self) -> int:
        return len(decoder_layers(self._model))

    def watch(self, paths: Collection[str], seen: Callable[[str, Tensor], None]) -> None:
        """Run the block, and call `seen` with the path of each module and its inputs (T, I), batch by batch."""
        for _ in self._watched(paths, seen):
            pass

    def advance(self, paths: Collection[str] = (), seen: Callable[[str, Tensor], None] = lambda *_: None) -> None:
        """Run the block, watched as by `watch`, keep its outputs on the CPU, and go to the next one."""
        self._hidden = [hidden_BSD.cpu() for hidden_BSD in self._watched(paths, seen)]
        self.block += 1

    def _watched(self, paths: Collection[str], seen: Callable[[str, Tensor], None]) -> Iterator[Tensor]:
        """Yield the block's outputs (B, S, D), batch by batch."""
        block = decoder_layers(self._model)[self.block]
        named = {self._names[id(block.get_submodule(path))]: path for path in paths}
        for number, (_, _, mask_BS) in enumerate(self._batches):

            def hook(name: str, input_BSI: Tensor, mask_BS: Tensor = mask_BS) -> None:
                seen(named[name], at_tokens(input_BSI, mask_BS))

            with watched_inputs(self._model, named, hook):
                yield self._run(number)

    def _run(self, number: int) -> Tensor:
        """Return the block's outputs (B, S, D) for a batch."""
        ids_BS, attention_BS, _ = self._batches[number]
        hidden_BSD = self._hidden[number]
        before = nullcontext()
        if hidden_BSD is not None:
            device = next(self._model.parameters()).device
            before = continued_from(self._model, self.block - 1, hidden_BSD.to(device))
        with evaluation_mode(self._model), before:
            return hidden_states_at(self._model, [self.block], ids_BS, attention_BS)[self.block]
