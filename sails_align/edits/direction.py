"""Find the direction of the residual stream that tells harmful prompts from harmless ones (arXiv 2406.11717).

Shapes: D d_model, N prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from sails_align.core.errors import InputError
from sails_align.core.progress import progress_bar
from sails_align.edits.apply import check_new
from sails_align.edits.linears import WRITERS, linears_of
from sails_align.edits.logits import checked_device
from sails_align.edits.options import DirectionOptions
from sails_align.edits.requests import SIDES, split_sides
from sails_align.edits.weights import Weights, open_weights
from sails_align.models.hooks import check_layers, decoder_layers
from sails_align.models.load import empty_model, load_model, load_spec_tokenizer
from sails_align.models.norms import has_known_norms, norm_gain
from sails_align.subspace.concepts import prompt_states

States = Mapping[int, Tensor]
"""Layer -> hidden states (N, D) at the last token of prompts, float64 on the CPU."""


@dataclass(frozen=True)
class Direction:
    """A direction and where it is from."""

    layer: int
    vector: Tensor
    """(D,), from harmless to harmful prompts, unit norm, float64."""
    separations: Mapping[int, float]
    """Of each layer that was looked at, on validation prompts: see `d_prime`."""
    source: str

    def randomized(self, seed: int | None) -> "Direction":
        """Return a random direction in its place, as a control; without a seed, the direction itself."""
        if seed is None:
            return self
        vector_D = torch.randn(len(self.vector), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return replace(self, vector=vector_D / vector_D.norm(), source=f"{self.source}; replaced by a random one")

    def summary(self) -> str:
        """Return one line for the user."""
        found = f"separates validation prompts by {self.separations[self.layer]:.1f} standard deviations"
        return f"the direction is that of layer {self.layer}, which {found} ({self.source})"


@dataclass(frozen=True)
class Writing:
    """A model, the direction that is found in it, and the matrices that write to its residual stream."""

    weights: Weights
    direction: Direction
    gains: Mapping[str, Tensor | None]
    """Name of such a matrix -> the gain (D,) of the norm behind it, if there is one."""


def find_writing(method: str, run: Path, output: Path, options: DirectionOptions) -> Writing:
    """Open a model and find the direction in it.

    Raises `InputError` as `open_weights` and `find_direction`; if the output folder is not empty; or if the
    architecture is not supported.
    """
    weights = open_weights(run, options.base_model)
    check_new(output)
    places = linears_of(weights, WRITERS)
    _check_norms(method, weights)
    model = load_model(weights.spec, checked_device(options.device))
    direction = find_direction(model, weights, run, options)
    blocks = decoder_layers(model)
    return Writing(
        weights,
        direction.randomized(options.control_seed),
        {name: norm_gain(blocks[place.block], place.path, floored=False) for name, place in places.items()},
    )


def _check_norms(method: str, weights: Weights) -> None:
    """Refuse a model of which it is not known whether a norm stands behind the projections, with an `InputError`."""
    for block in decoder_layers(empty_model(weights.config)):
        if not has_known_norms(block):
            raise InputError(
                f"{method} does not know how the norms of {type(block).__name__} are arranged;\n"
                "give a Gemma, Llama, Qwen or Mistral model"
            )


def find_direction(model: PreTrainedModel, weights: Weights, run: Path, options: DirectionOptions) -> Direction:
    """Return the difference of means at the layer that is asked for, or at the one that separates best.

    Raises `InputError` as `find_requests`; if there are too few prompts, or no such layer; or if the two sides have the
    same mean.
    """
    layers = range(len(decoder_layers(model))) if options.layer is None else [options.layer]
    check_layers(model, layers)
    tokenizer = load_spec_tokenizer(weights.spec)
    fitted_on, validated_on, source = split_sides(options, run, weights, tokenizer)

    def states(rows: Dataset) -> States:
        prompts = [_with_system(row["prompt"], options.system_prompt) for row in rows]  # pyright: ignore
        found = prompt_states(model, tokenizer, layers, prompts, options.max_length)
        return {layer: hidden_ND.double() for layer, hidden_ND in found.items()}

    with progress_bar(shown=True) as bar:
        bar.add_task("reading prompts", total=None)
        fitted, validation = ({side: states(part[side]) for side in SIDES} for part in (fitted_on, validated_on))
    return choose(fitted, validation, source)


def choose(fitted: Mapping[str, States], validation: Mapping[str, States], source: str) -> Direction:
    """Return the direction that separates the validation prompts best, over the layers."""
    vectors = {layer: _difference(fitted, layer) for layer in fitted["harmful"]}
    separations = {
        layer: d_prime(*(validation[side][layer] @ vector_D for side in SIDES)) for layer, vector_D in vectors.items()
    }
    layer = max(separations, key=lambda layer: separations[layer])
    return Direction(layer, vectors[layer], separations, source)


def d_prime(harmful_N: Tensor, harmless_N: Tensor) -> float:
    """Return the difference of two means in pooled standard deviations (d')."""
    pooled = ((harmful_N.var(correction=0) + harmless_N.var(correction=0)) / 2).sqrt()
    return ((harmful_N.mean() - harmless_N.mean()) / pooled.clamp(min=1e-12)).item()


def _difference(states: Mapping[str, States], layer: int) -> Tensor:
    difference_D = states["harmful"][layer].mean(0) - states["harmless"][layer].mean(0)
    if not (difference_D.isfinite().all() and difference_D.any()):
        raise InputError(
            f"harmful and harmless prompts have the same mean at layer {layer}, or it is not finite: there is no "
            "direction;\ncheck that the two datasets differ, and that the model is whole"
        )
    return difference_D / difference_D.norm()


def _with_system(prompt: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    """Return a prompt with a system prompt in place of its own, if one is given."""
    if system is None:
        return prompt
    return [{"role": "system", "content": system}, *(turn for turn in prompt if turn["role"] != "system")]
