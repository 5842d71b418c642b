"""The graph penalty of graph-regularised SAEs (GSAE, arXiv 2512.06655) on the directions of a decoder.

Coordinates of the residual stream are connected if they vary together over prompts. With x their values at the last
token of each prompt,

    A_ij = corr(x_i, x_j) if that is at least the threshold, i /= j        L = I - D^-1/2 A D^-1/2
    penalty = mean over latents j of w_j^T L w_j

and the energy of a direction w is

    w^T L w = 1/2 sum_ij A_ij (w_i / sqrt d_i - w_j / sqrt d_j)^2 + sum over coordinates i without a neighbour of w_i^2

so that directions whose connected coordinates agree are preferred. Ours: the last token in place of the mean of all
tokens; and directions of norm 1, since a TopK SAE could make the penalty small by shrinking its decoder alone.

Shapes: N prompts, D d_model, F d_sae.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.artifacts import content_hash
from sails_align.core.errors import InputError
from sails_align.data.pairs import requests_of
from sails_align.data.tokens import TemplateCheck, tokenize_prompt
from sails_align.saes.options import SAETrainingOptions
from sails_align.saes.token_stream import hidden_states_of

logger = logging.getLogger(__name__)

MAX_LENGTH = 1024
"""Tokens of the longest prompt that is read."""


def adjacency(states_ND: Tensor, threshold: float) -> Tensor:
    """Return the weights (D, D) of the graph: the cosine of two columns where it is at least the threshold, else 0.

    The cosine of centred columns is their correlation. A column of zeros has no neighbours, nor has any column itself.
    """
    profiles_ND = normalize(states_ND.double(), dim=0)
    cosine_DD = profiles_ND.T @ profiles_ND
    weights_DD = torch.where(cosine_DD >= threshold, cosine_DD, 0.0).clamp(min=0)
    return weights_DD.fill_diagonal_(0)


def laplacian(weights_DD: Tensor) -> Tensor:
    """Return the normalised Laplacian (D, D) of a graph; a coordinate without a neighbour has 1 on the diagonal."""
    degree_D = weights_DD.sum(1)
    scale_D = torch.where(degree_D > 0, degree_D, 1.0).rsqrt()
    return torch.eye(len(weights_DD)).to(weights_DD) - scale_D[:, None] * weights_DD * scale_D


def permuted(matrix_DD: Tensor, seed: int) -> Tensor:
    """Return the matrix with its coordinates permuted at random: a graph of the same degrees between others."""
    order_D = torch.randperm(len(matrix_DD), generator=torch.Generator().manual_seed(seed)).to(matrix_DD.device)
    return matrix_DD[order_D][:, order_D]


def energies(directions_FD: Tensor, laplacian_DD: Tensor) -> Tensor:
    """Return w^T L w of each direction (F,)."""
    return ((directions_FD @ laplacian_DD) * directions_FD).sum(1)


@dataclass(frozen=True, eq=False)
class GraphPenalty:
    """The penalty of one layer's decoder."""

    laplacian: Tensor
    """(D, D)"""
    n_edges: int
    n_isolated: int
    """Coordinates without a neighbour."""
    weight: float
    """Times the mean energy, it is added to the reconstruction error of a coordinate."""

    @torch.no_grad()
    def mean_energy(self, W_dec_FD: Tensor) -> float:
        """Return the mean energy of a decoder's directions, from 0 to 2."""
        return energies(normalize(W_dec_FD, dim=1), self.laplacian.to(W_dec_FD)).mean().item()

    def add_to(self, W_dec_FD: Tensor) -> None:
        """Add the penalty's gradient to each gradient of a decoder, which is the same as adding it to any loss.

        sae-lens sums the reconstruction error over the D coordinates; so the penalty is multiplied by D.
        """
        scale = self.weight * W_dec_FD.shape[1]
        laplacian_DD = self.laplacian.to(W_dec_FD)

        def added(gradient_FD: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf_FD = W_dec_FD.detach().requires_grad_()
                penalty = scale * energies(normalize(leaf_FD, dim=1), laplacian_DD).mean()
                (of_penalty_FD,) = torch.autograd.grad(penalty, leaf_FD)
            return gradient_FD + of_penalty_FD

        W_dec_FD.register_hook(added)


@dataclass(frozen=True, eq=False)
class PromptGraph:
    """The graphs of some layers of a model, made of one set of prompts."""

    penalties: Mapping[int, GraphPenalty]
    metadata: Mapping[str, Any]
    """What they were made of (JSON-able)."""


def prompt_graph(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any] | None,
    layers: Sequence[int],
    options: SAETrainingOptions,
) -> PromptGraph:
    """Make the graph of each layer, from the outputs of its block at the last tokens of prompts.

    Args:
        model: in evaluation mode.
        tokenizer: with a chat template.
        prompts: what `requests_of` takes: texts, conversations, or rows; those longer than `MAX_LENGTH` are left out.
        layers: by block.
        options: threshold, weight, and the seed of a control.

    Raises:
        InputError: if there are fewer than two prompts, or a graph has no edge.
    """
    rows = requests_of(prompts, name="the prompts of the graph", check=TemplateCheck(tokenizer)) if prompts else []
    sides = [tokenize_prompt(tokenizer, row["prompt"], MAX_LENGTH, tokens="last") for row in rows]  # pyright: ignore
    sides = [side for side in sides if any(side.mask)]
    if len(sides) < 2:
        raise InputError(
            f"graph_lambda is {options.graph_lambda}, but there are {len(sides)} prompts to make a graph of;\n"
            "give a dataset of some hundred with --graph_dataset_name (from Python: graph_prompts)"
        )
    with torch.no_grad():
        states = hidden_states_of(model, layers, sides)
    metadata = {
        "lambda": options.graph_lambda,
        "threshold": options.graph_threshold,
        "control_seed": options.graph_control_seed,
        "n_prompts": len(sides),
        "prompts_sha256": content_hash([side.input_ids for side in sides]),
    }
    return PromptGraph({layer: graph_penalty(layer, states[layer], options) for layer in layers}, metadata)


def graph_penalty(layer: int, states_ND: Tensor, options: SAETrainingOptions) -> GraphPenalty:
    """Return the penalty of one layer, from hidden states at the last tokens of prompts.

    Raises `InputError` if no two coordinates are connected.
    """
    centred_ND = states_ND.double() - states_ND.double().mean(0)
    weights_DD = adjacency(centred_ND, options.graph_threshold)
    n_edges = int((weights_DD > 0).sum()) // 2
    if n_edges == 0:
        raise InputError(
            f"no two coordinates of layer {layer} have a correlation of {options.graph_threshold} or more, so the "
            "graph has no edge;\nlower graph_threshold, or give more prompts"
        )
    n_isolated = int((weights_DD.sum(1) == 0).sum())
    if 2 * n_isolated > len(weights_DD):
        logger.warning(
            "layer %d: %d of %d coordinates have no neighbour in the graph, and the penalty makes directions avoid "
            "them; lower graph_threshold",
            layer,
            n_isolated,
            len(weights_DD),
        )
    laplacian_DD = laplacian(weights_DD)
    if options.graph_control_seed is not None:
        laplacian_DD = permuted(laplacian_DD, options.graph_control_seed)
    return GraphPenalty(laplacian_DD, n_edges, n_isolated, options.graph_lambda)
