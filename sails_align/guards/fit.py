"""Fit a guard: a projector at each layer, of which the one with the best AUC on validation prompts stays.

Shapes: N prompts, D d_model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from sails_align.core.artifacts import content_hash, read_header, save_artifact
from sails_align.core.earlier import remedy_of
from sails_align.core.errors import InputError
from sails_align.core.options import all_but
from sails_align.core.progress import progress_bar
from sails_align.data.tokens import read_chat_template
from sails_align.edits.direction import States, d_prime
from sails_align.edits.requests import SIDES, split_sides
from sails_align.guards.guard import PROJECTOR, LoadedModel, model_hash, prompt_hash
from sails_align.guards.options import GuardFitOptions
from sails_align.guards.projector import Projector, auc, fit_projector
from sails_align.models.hooks import check_layers, decoder_layers
from sails_align.subspace.concepts import prompt_states

N_THRESHOLDS = 256
"""That a calibration tests, from the lowest to the highest score of the prompts that the guard was fitted on."""


@dataclass(frozen=True, eq=False)
class FittedProjector:
    """The projector of the best layer."""

    layer: int
    projector: Projector
    thresholds: Tensor
    """(N_THRESHOLDS,), ascending, float64."""
    aucs: Mapping[int, float]
    """Of each layer that was looked at, on validation prompts."""


def fit_guard(run: Path, output: Path, options: GuardFitOptions, *, overwrite: bool = False) -> dict[str, Any]:
    """Fit a guard on prompts and save it. Returns what its JSON file says.

    A guard that was made of the same model, prompts and options is kept.

    Args:
        run: of which `resolve_model` finds the model, and `find_requests` the prompts.
        output: the guard's folder.
        options: which prompts, and how it is fitted.
        overwrite: whether another guard in the folder may be replaced.

    Raises:
        InputError: for a model, a layer or data that cannot be used, or if the folder holds another guard.
    """
    template = None if options.chat_template_path is None else read_chat_template(options.chat_template_path)
    model = LoadedModel.open(str(run), options.base_model, options.device, template)
    layers = range(len(decoder_layers(model.model))) if options.layer is None else [options.layer]
    check_layers(model.model, layers)
    fitted_on, validated_on, source = split_sides(options, run, model, model.tokenizer)
    hashes = {side: _hashes(fitted_on[side], validated_on[side]) for side in SIDES}
    about = {
        "model_hash": model_hash(model.spec),
        "data_hash": content_hash(hashes),
        "options": all_but(("device", "base_model", "chat_template_path"), options),
    }
    input_hash = content_hash(about)
    earlier = read_header(output / PROJECTOR, PROJECTOR)
    if earlier is not None and earlier["input_hash"] == input_hash:
        return earlier["provenance"]
    if earlier is not None and not overwrite:
        raise InputError(f"{output} holds another guard;\n{remedy_of('--output')}")

    def states(rows: Dataset) -> States:
        return prompt_states(model.model, model.tokenizer, layers, list(rows["prompt"]), options.max_length)

    with progress_bar(shown=True) as bar:
        bar.add_task("fitting the guard", total=None)
        fitted, validation = ([states(part[side]) for side in SIDES] for part in (fitted_on, validated_on))
        found = fit_layers(fitted, validation, options)
    about |= {
        "model": str(run),
        "base_model": options.base_model,
        "chat_template": template,
        "source": source,
        "layer": found.layer,
        "auc": {str(layer): value for layer, value in found.aucs.items()},
        "n_parameters": sum(parameter.numel() for parameter in found.projector.parameters()),
        "prompt_hashes": sorted({*hashes["harmful"], *hashes["harmless"]}),
    }
    tensors = {**found.projector.state_dict(), "thresholds": found.thresholds}
    save_artifact(output / PROJECTOR, PROJECTOR, tensors, about, input_hash)
    return about


def fit_layers(fitted: list[States], validation: list[States], options: GuardFitOptions) -> FittedProjector:
    """Fit a projector at each layer on the states of harmful and of harmless prompts, and choose among them.

    The highest AUC counts; among equal ones, the widest separation in standard deviations.
    """
    found: dict[int, tuple[Projector, Tensor]] = {}
    aucs, separations = {}, {}
    for layer in fitted[0]:
        sides, held_out = (
            labelled(*(states[layer] for states in part), seed=options.control_seed) for part in (fitted, validation)
        )
        projector = fit_projector(
            *sides,
            dimension=options.dimension,
            steps=options.steps,
            contrastive_weight=options.contrastive_weight,
            seed=options.data_seed,
        )
        scores = [projector.scores(hidden_ND).double() for hidden_ND in held_out]
        aucs[layer], separations[layer] = auc(*scores), d_prime(*scores)
        found[layer] = projector, torch.cat([projector.scores(hidden_ND) for hidden_ND in (*sides, *held_out)])
    layer = max(aucs, key=lambda layer: (aucs[layer], separations[layer]))
    projector, scores_N = found[layer]
    least, most = scores_N.double().aminmax()
    thresholds = torch.linspace(least.item(), most.item(), N_THRESHOLDS, dtype=torch.float64)
    return FittedProjector(layer, projector, thresholds, aucs)


def labelled(harmful_ND: Tensor, harmless_ND: Tensor, *, seed: int | None) -> tuple[Tensor, Tensor]:
    """Return the two kinds of states as they are; with a seed, as a control, dealt at random to kinds as large."""
    if seed is None:
        return harmful_ND, harmless_ND
    both_ND = torch.cat([harmful_ND, harmless_ND])
    order_N = torch.randperm(len(both_ND), generator=torch.Generator().manual_seed(seed))
    return both_ND[order_N[: len(harmful_ND)]], both_ND[order_N[len(harmful_ND) :]]


def _hashes(*parts: Dataset) -> list[str]:
    return sorted({prompt_hash(prompt) for rows in parts for prompt in rows["prompt"]})
