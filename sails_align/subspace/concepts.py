"""Count the features of a subspace that are concepts of harm, before and after training.

Shapes: N requests, D d_model, F d_sae, K features or directions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.data.messages import Message
from sails_align.data.tokens import padded, tokenize_prompt
from sails_align.models.hooks import evaluation_mode, token_states
from sails_align.saes.load import ResidualSAE
from sails_align.subspace.basis import NUMBERS, Subspace

N_SHOWN = 8
"""Number of features per layer that are described."""
SAFETY_SHARE = 0.8
"""Of a feature's activation, that is on harmful requests if it is a concept of harm."""
BATCH_SIZE = 16
States = Mapping[int, Tensor]
"""Hidden states at the end of requests: layer -> (N, D)."""


def concepts(
    subspace: Subspace,
    saes: Mapping[int, ResidualSAE],
    before: tuple[States, States],
    after: tuple[States, States],
) -> dict[str, Any]:
    """Describe the features of a subspace (JSON-able).

    `before` and `after` training, a pair holds the hidden states of harmful and of harmless requests.
    """
    of_layers = subspace.provenance["features"]["layers"]
    return {
        "onset": subspace.onset,
        "separation": subspace.provenance.get("separation"),
        "layers": {
            layer: _of_layer(int(layer), about, saes[int(layer)], {"before": before, "after": after})
            for layer, about in of_layers.items()
        },
    }


def shown(subspace: Subspace) -> dict[int, list[int]]:
    """Select the features to describe: layer -> ids, highest scores first."""
    of_layers = subspace.provenance["features"]["layers"]
    return {int(layer): about["ids"][:N_SHOWN] for layer, about in of_layers.items()}


def _of_layer(
    layer: int,
    about: Mapping[str, Any],
    sae: ResidualSAE,
    states: Mapping[str, tuple[States, States]],
) -> dict[str, Any]:
    """Return the precision of the chosen features as concepts of harm, that of others, and their activations."""
    ids = about["ids"]
    acts = {when: [sae.encode(side[layer]).cpu() for side in sides] for when, sides in states.items()}
    harmful_NF, harmless_NF = acts["before"]
    is_safety_F = harm_share(harmful_NF, harmless_NF) >= SAFETY_SHARE
    fires_F = (harmful_NF > 0).any(0) | (harmless_NF > 0).any(0)
    hidden = [side[layer] for side in states["before"]]
    pooled_ND = torch.cat(list(hidden))
    _, _, directions_KD = torch.linalg.svd(pooled_ND - pooled_ND.mean(0), full_matrices=False)
    directions_KD = torch.cat([directions_KD[: len(ids)], -directions_KD[: len(ids)]])
    along = [(side - pooled_ND.mean(0)) @ directions_KD.T for side in hidden]
    of_pca_K = harm_share(*(values.clamp(min=0) for values in along))
    difference_D = hidden[0].mean(0) - hidden[1].mean(0)
    of_mean = harm_share(*(((side - pooled_ND.mean(0)) @ difference_D).clamp(min=0)[:, None] for side in hidden))
    return {
        "precision": is_safety_F[list(ids)].float().mean().item(),
        "precision_of_random": is_safety_F[fires_F].float().mean().item(),
        "precision_of_pca": (of_pca_K >= SAFETY_SHARE).float().mean().item(),
        "harm_share_of_mean_difference": of_mean.item(),
        "features": [
            {
                "id": feature,
                **{name: about[name][place] for name in NUMBERS if name in about},
                "is_safety": bool(is_safety_F[feature]),
                **{
                    f"{side}_{when}": round(values[number][:, feature].mean().item(), 4)
                    for when, values in acts.items()
                    for number, side in enumerate(("harmful", "harmless"))
                },
            }
            for place, feature in enumerate(ids[:N_SHOWN])
        ],
    }


def harm_share(harmful_NK: Tensor, harmless_NK: Tensor) -> Tensor:
    """Return the share of the mean activation that is on harmful requests; 0 for inactive features. (K,)"""
    harmful_K, harmless_K = harmful_NK.mean(0), harmless_NK.mean(0)
    both_K = harmful_K + harmless_K
    return torch.where(both_K > 0, harmful_K / both_K.clamp(min=1e-12), 0.0)


@torch.no_grad()
def last_token_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    requests: Sequence[list[Message]],
    max_length: int = 1024,
) -> States:
    """Return the hidden states at the last token of each request, in float32 on the CPU."""
    sides = [tokenize_prompt(tokenizer, request, max_length, tokens="last") for request in requests]
    batches = [sides[start : start + BATCH_SIZE] for start in range(0, len(sides), BATCH_SIZE)]
    with evaluation_mode(model):
        parts = [token_states(model, layers, *padded(batch)) for batch in batches]
    return {layer: torch.cat([part[layer].float().cpu() for part in parts]) for layer in layers}


def prompt_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    prompts: Sequence[list[Message]],
    max_length: int,
) -> States:
    """Return the same of those prompts that are not cut off; raise `InputError` if there is none."""
    found = last_token_states(model, tokenizer, layers, prompts, max_length)
    if not len(found[layers[0]]):
        raise InputError(f"no prompt is shorter than max_length ({max_length}); raise it")
    return found
