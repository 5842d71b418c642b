"""GuardSpace (arXiv 2510.14301): fine-tune where harmful prompts have no energy, so that refusals stay.

For each adapted module, C = E[x x^T] is the second moment of its inputs x on harmful prompts. Then

    W C~ = U S V^T, where C~ = C + 0.01 mean(diag C) I
    B0 = U_r sqrt(S_r) and A0 = sqrt(S_r) V_r^T C~^-1, of the r smallest singular values: what harm needs least
    P = I - N N^T, the projector on the null space of C
    y = (W - B0 A0 P) x + B A P x, where A and B are trained from A0 and B0

Whatever they become, an input with P x = 0 gives W x. The paper's null space has eigenvalue zero; with more tokens
than inputs there is none, so here N holds the eigenvectors with the first share of the trace (`guard_energy`). The
energy outside of them is not protected, and its share is reported. C is the mean, not the sum, so that the factors do
not depend on the number of prompts. The base weights are not changed: see `difference`.

Shapes: R rank, I inputs and O outputs of a module, K removed directions, M singular values.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from sails_align.core.errors import InputError
from sails_align.initializers.difference import Start, start_from
from sails_align.initializers.entry_options import GuardSpaceOptions
from sails_align.initializers.examples import StartExamples
from sails_align.initializers.moments import InputMoment, adapted_linears, input_moments
from sails_align.initializers.peft import check_plain

LOADING = 0.01
"""Of the mean of C's diagonal, added before C is inverted. In float64 that is always enough: the condition number is
then at most 100 times the number of inputs."""


@dataclass(frozen=True, eq=False)
class NullSpace:
    """Where harmful prompts have no energy, or little."""

    removed: Tensor
    """(I, K): orthonormal basis of the complement, which the adapter does not read."""
    dropped_share: float
    """Of the energy, 0 to 1: what lies in the null space all the same, and is not protected."""

    @property
    def dimension(self) -> int:
        return self.removed.shape[0] - self.removed.shape[1]

    @property
    def projector(self) -> Tensor:
        """(I, I)"""
        identity_II = torch.eye(len(self.removed), dtype=self.removed.dtype, device=self.removed.device)
        return identity_II - self.removed @ self.removed.T


def null_space(moment_II: Tensor, energy: float) -> NullSpace:
    """Return the space outside the eigenvectors that hold the first share `energy` of a second moment's trace.

    With a share of 1 it is the exact null space: what is left beyond the rank of the moment, up to rounding.
    """
    values_I, vectors_II = torch.linalg.eigh(moment_II)
    values_I, vectors_II = values_I.flip(0).clamp(min=0), vectors_II.flip(1)
    rounding = len(values_I) * torch.finfo(values_I.dtype).eps * values_I[0]
    rank = int((values_I > rounding).sum())
    shares_I = values_I / values_I.sum().clamp(min=torch.finfo(values_I.dtype).tiny)
    k = rank if energy == 1 else min(rank, int((shares_I.cumsum(0) < energy).sum()) + 1)
    return NullSpace(vectors_II[:, :k].contiguous(), shares_I[k:].sum().item())


def smallest_part(W_OI: Tensor, moment_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the part of a weight that the inputs use least: A0 (R, I) and B0 (O, R), in float64."""
    W_OI, loaded_II = W_OI.double(), moment_II.clone()
    loaded_II.diagonal().add_(LOADING * moment_II.diagonal().mean())
    U_OM, S_M, Vh_MI = torch.linalg.svd(W_OI @ loaded_II, full_matrices=False)
    roots_R = S_M[-rank:].sqrt()
    # C~ is symmetric: V^T C~^-1 is (C~^-1 V)^T.
    A_RI = torch.linalg.solve(loaded_II, Vh_MI[-rank:].T).T * roots_R[:, None]
    return A_RI, U_OM[:, -rank:] * roots_R


class GuardSpace:
    """Initialize adapters from what harmful prompts use least, and let them read their null space only."""

    name = "guardspace"

    def configure(self, config: LoraConfig) -> None:
        """Refuse what is no plain LoRA; `finish` writes the values once the adapter is made."""
        check_plain(config, self.name)

    @torch.no_grad()
    def finish(self, model: PeftModel, examples: StartExamples, options: GuardSpaceOptions) -> dict[str, Any]:
        """Run the harmful prompts, and start the adapter. Every process is given the same, and finds the same.

        Returns, for each module, the number of its inputs, the dimension of the null space, and the dropped share.
        Raises `InputError` if a null space is empty, or the rank is too high for a module.
        """
        layers, starts, report = adapted_linears(model), {}, {}
        known: tuple[InputMoment, NullSpace] | None = None  # modules that read the same have the same one
        tokens: Any = options.guard_tokens
        for name, (moment,) in input_moments(model, [examples.prompts(tokens)]):
            if known is None or known[0] is not moment:
                known = moment, null_space(moment.mean, options.guard_energy)
            space = known[1]
            _check_dimension(name, space, moment, options)
            starts[name] = _start(name, layers[name], moment, space)
            report[name.removeprefix("base_model.model.")] = {
                "inputs": len(space.removed),
                "null_space": space.dimension,
                "dropped_share": space.dropped_share,
            }
        start_from(model, starts, self.name)
        return report

    def summary(self, report: dict[str, Any]) -> str:
        """Say in one line what was found."""
        sizes = sorted((of["null_space"], of["inputs"]) for of in report.values())
        share = max(of["dropped_share"] for of in report.values())
        (least, of_least), (most, of_most) = sizes[0], sizes[-1]
        return (
            f"null space of the harmful prompts: {least} of {of_least} to {most} of {of_most} inputs; "
            f"at most {share:.2%} of their energy is in it"
        )


def _start(name: str, module: LoraLayer, moment: InputMoment, space: NullSpace) -> Start:
    W_OI: Any = module.get_base_layer().weight
    rank, scaling = module.r["default"], module.scaling["default"]
    if rank > min(W_OI.shape):
        raise InputError(f"{name} has rank {rank}, but only {min(W_OI.shape)} singular values; lower --lora_r")
    A_RI, B_OR = smallest_part(W_OI, moment.mean, rank)
    # The adapter's product is multiplied by the scaling, and is to be that part of W.
    return Start(A_RI / scaling**0.5, B_OR / scaling**0.5, space.removed)


def _check_dimension(name: str, space: NullSpace, moment: InputMoment, options: GuardSpaceOptions) -> None:
    if space.dimension == 0:
        fewer = "" if options.guard_tokens == "last" else ", or protect the last tokens only (--guard_tokens last)"
        raise InputError(
            f"the harmful prompts fill all {len(space.removed)} dimensions of the inputs of {name} "
            f"({moment.n_tokens} tokens): the projector is zero, and nothing could be learned;\n"
            f"choose a --guard_energy below {options.guard_energy:g}{fewer}, or give fewer prompts"
        )


METHOD = GuardSpace()
