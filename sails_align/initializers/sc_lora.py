"""SC-LoRA (arXiv 2505.23724): start in the output directions that the task uses most and harmful prompts least.

For each adapted module, h = W x are its outputs. With the second moments of h on examples of the task (+) and on
harmful prompts (-), whose treatment is to be preserved,

    D = (1 - beta) E+[h h^T] - beta E-[h h^T]
    Q = the r eigenvectors of D with the largest eigenvalues
    B0 = Q, A0 = Q^T W, and y = (W - B0 A0) x + B A x, where A and B are trained from A0 and B0

Of all subspaces of r dimensions, the span of Q has the largest (1 - beta) E+ |Q^T h|^2 - beta E- |Q^T h|^2. Nothing
keeps B there later. As E[h h^T] = W E[x x^T] W^T, only inputs are summed up. The base weights are not changed: see
`difference`.

Shapes: R rank, I inputs and O outputs of a module.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from sails_align.core.errors import InputError
from sails_align.initializers.difference import Start, start_from
from sails_align.initializers.entry_options import ScLoraOptions
from sails_align.initializers.examples import StartExamples, whole
from sails_align.initializers.moments import adapted_linears, input_moments
from sails_align.initializers.peft import check_plain


@dataclass(frozen=True, eq=False)
class Outputs:
    """Output directions of one module."""

    basis: Tensor
    """(O, R): orthonormal, float64."""
    task_share: float
    """Of the energy of the outputs on the task, 0 to 1: what lies in the basis."""
    harmful_share: float
    """The same on harmful prompts."""


def output_directions(W_OI: Tensor, task_II: Tensor, harmful_II: Tensor, beta: float, rank: int) -> Outputs:
    """Return the directions of a module's outputs for the second moments of its inputs on the task and on harm."""
    task_OO, harmful_OO = (W_OI.double() @ moment_II @ W_OI.double().T for moment_II in (task_II, harmful_II))
    _, vectors_OO = torch.linalg.eigh((1 - beta) * task_OO - beta * harmful_OO)
    basis_OR = vectors_OO[:, -rank:].flip(1)
    shares = [
        ((basis_OR.T @ moment_OO @ basis_OR).trace() / moment_OO.trace()).item() for moment_OO in (task_OO, harmful_OO)
    ]
    return Outputs(basis_OR, *shares)


class ScLora:
    """Initialize adapters with directions of outputs, and train the difference from there."""

    name = "sc_lora"

    def configure(self, config: LoraConfig) -> None:
        """Refuse what is no plain LoRA; `finish` writes the values once the adapter is made."""
        check_plain(config, self.name)

    @torch.no_grad()
    def finish(self, model: PeftModel, examples: StartExamples, options: ScLoraOptions) -> dict[str, Any]:
        """Run both sets of examples, and start the adapter. Every process is given the same, and finds the same.

        Returns, for each module, which shares of the energy of its outputs are in the directions. Raises `InputError`
        if there are no examples of the task, or the rank is too high for a module.
        """
        if examples.task is None:
            raise InputError(
                "--init sc_lora compares the task with harmful prompts, and there are no harmless examples;\n"
                "give --helpful_dataset_name; or name the harmful prompts with --harmful_prompts, and all training "
                "data is the task's"
            )
        task = [whole(side) for side in examples.responses(examples.task)]
        layers, starts, report = adapted_linears(model), {}, {}
        for name, (of_task, of_harmful) in input_moments(model, [task, examples.prompts("all")]):
            module = layers[name]
            W_OI: Any = module.get_base_layer().weight
            rank, scaling = module.r["default"], module.scaling["default"]
            if rank > len(W_OI):
                raise InputError(f"{name} has rank {rank}, but only {len(W_OI)} outputs; lower --lora_r")
            found = output_directions(W_OI, of_task.mean, of_harmful.mean, options.sc_lora_beta, rank)
            # The adapter's product is multiplied by the scaling, and is to be that part of W.
            starts[name] = Start(found.basis.T @ W_OI.double() / scaling, found.basis)
            report[name.removeprefix("base_model.model.")] = {
                "task_share": found.task_share,
                "harmful_share": found.harmful_share,
            }
        start_from(model, starts, self.name)
        return report

    def summary(self, report: dict[str, Any]) -> str:
        """Say in one line what was found."""
        means = [sum(of[name] for of in report.values()) / len(report) for name in ("task_share", "harmful_share")]
        return (
            f"output directions: with {means[0]:.1%} of the energy of the task and {means[1]:.1%} of that of harmful "
            "prompts, as means over modules"
        )


METHOD = ScLora()
