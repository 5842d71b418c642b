"""Sum up what adapted modules read: the second moment of their inputs over chosen tokens.

Modules that are given the same tensor, as q, k and v are, share one moment, which is computed once. It needs
8 * inputs^2 bytes, so modules are taken in groups that fit a budget, with one pass over the sequences for each.

Shapes: B batch, S sequence, T tokens in a mask, I inputs of a module.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sails_align.core.errors import InputError
from sails_align.data.tokens import TokenizedSide, padded
from sails_align.models.hooks import at_tokens, evaluation_mode
from sails_align.models.inputs import watched_inputs
from sails_align.subspace.forward import batches

BUDGET = 8 * 2**30
"""Bytes of the moments that are summed up in one pass."""
BATCH_SIZE, MAX_TOKENS = 16, 4096


@dataclass(eq=False)
class InputMoment:
    """The inputs of one module, or of several that read the same."""

    sum: Tensor
    """(I, I): of the inputs' outer products, float64."""
    n_tokens: int = 0

    @property
    def mean(self) -> Tensor:
        """(I, I)"""
        return self.sum / max(self.n_tokens, 1)


def adapted_linears(model: PeftModel, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Return the adapted modules by their names within the PEFT model.

    Raises `InputError` if one of them is no linear module, or its weights are quantized.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.r}
    for name, module in layers.items():
        base: Any = module.get_base_layer()
        if type(base) is not nn.Linear or not base.weight.is_floating_point():
            raise InputError(
                f"{name} is {type(base).__name__}, but the weights of a plain linear module are needed;\n"
                "leave it out of --lora_target_modules, and do not quantize the model"
            )
    return layers


def input_moments(
    model: PeftModel, sides: Sequence[Sequence[TokenizedSide]], *, budget: int = BUDGET
) -> Iterator[tuple[str, list[InputMoment]]]:
    """Yield each adapted module's name, and the moments of its inputs on every side, at the tokens in the masks.

    The adapter must compute zero, as a fresh one does. Modules that read the same tensor get the same objects. Do not
    keep them: a group's moments are given up for those of the next.

    Raises `InputError` as `adapted_linears`, or if a side has no token or an input is not finite.
    """
    for group in _groups(adapted_linears(model), budget):
        found = [_moments(model, group, sequences) for sequences in sides]
        for name in group:
            yield name, [of_side[name] for of_side in found]


def _groups(layers: Mapping[str, LoraLayer], budget: int) -> Iterator[dict[str, LoraLayer]]:
    """Divide the modules, in the model's order, into groups whose moments fit the budget."""
    group: dict[str, LoraLayer] = {}
    used = 0
    for name, module in layers.items():
        needed = 8 * module.get_base_layer().in_features ** 2  # pyright: ignore[reportOperatorIssue]
        if group and used + needed > budget:
            yield group
            group, used = {}, 0
        group[name], used = module, used + needed
    if group:
        yield group


@torch.no_grad()
def _moments(
    model: PeftModel, group: Mapping[str, LoraLayer], sequences: Sequence[TokenizedSide]
) -> dict[str, InputMoment]:
    sums = _Sums()
    with evaluation_mode(model), watched_inputs(model, group, sums.add):
        device = next(model.parameters()).device
        for batch in batches(sequences, BATCH_SIZE, MAX_TOKENS):
            input_ids_BS, attention_mask_BS, sums.mask_BS = padded(batch)
            model(input_ids=input_ids_BS.to(device), attention_mask=attention_mask_BS.to(device), use_cache=False)
            sums.last = None
    for name in group:
        moment = sums.of.get(name)
        if moment is None or not moment.n_tokens:
            raise InputError(
                f"{name} has read no token of the examples to look at;\n"
                "check that there are some, and that --max_length leaves their ends"
            )
        if not moment.sum.isfinite().all():
            raise InputError(f"the inputs of {name} are not finite;\nload the model in bfloat16 or float32")
    return sums.of


class _Sums:
    """Add up the inputs of modules, as they are called one after another."""

    def __init__(self) -> None:
        self.of: dict[str, InputMoment] = {}
        self.mask_BS = torch.zeros(0, 0)
        self.last: tuple[Tensor, InputMoment] | None = None

    def add(self, name: str, x_BSI: Tensor) -> None:
        """Add the input of a module, unless the module before it was given the same tensor."""
        if self.last is not None and self.last[0] is x_BSI and self.of.get(name, self.last[1]) is self.last[1]:
            self.of[name] = self.last[1]
            return
        x_TI = at_tokens(x_BSI, self.mask_BS).double()
        if name not in self.of:
            self.of[name] = InputMoment(x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1]))
        moment = self.of[name]
        moment.sum.addmm_(x_TI.T, x_TI)
        moment.n_tokens += len(x_TI)
        self.last = x_BSI, moment
