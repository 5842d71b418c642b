"""What training in a subspace did, and how many of its features are truly concepts of harm, which the testbed knows."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sails_align.comparison.plan import Cell
from sails_align.subspace.basis import Subspace
from sails_align.subspace.discover import padded
from sails_align.subspace.hooks import hidden_states_at
from sails_align.subspace.meaning import meanings
from sails_align.subspace.sae import ResidualSAE, load_saes
from sails_align.testbed.build import Testbed
from sails_align.testbed.world import Request
from sails_align.tokens import TokenizedSide, tokenize_prompt, tokenize_response

N_SHOWN = 8
"""Features of a layer whose meaning is told."""
N_REQUESTS = 256
"""Held-out requests of each side."""
SAFETY_SHARE = 0.8
"""Of a feature's activation, that is on harmful requests if it is a concept of harm."""


def explain(
    cell: Cell, testbed: Testbed, subspace: Subspace, trained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What the features of a subspace are, on held-out requests of the test part, before and after training."""
    base = AutoModelForCausalLM.from_pretrained(testbed.model_path, dtype=torch.float32).eval()
    saes = load_saes(path=testbed.sae_path, model_config=base.config, model_name=testbed.model_path)
    world = testbed.world
    harmful = world.requests("test_harmful", N_REQUESTS // 2) + world.requests("test_ood", N_REQUESTS // 2)
    harmless = world.requests("test_benign", N_REQUESTS // 2) + world.requests("test_dual_use", N_REQUESTS // 2)
    states = {
        when: [last_token_states(model, tokenizer, list(saes), requests) for requests in (harmful, harmless)]
        for when, model in (("before", base), ("after", trained))
    }
    found: dict[str, Any] = {"onset": subspace.onset, "separation": subspace.provenance.get("separation"), "layers": {}}
    chosen: dict[int, list[int]] = {}
    for layer, about in subspace.provenance["features"]["layers"].items():
        ids = chosen[int(layer)] = about["ids"]
        found["layers"][layer] = _of_layer(int(layer), about, ids, saes[int(layer)], states)
    rows = world.requests("train_harmful", N_REQUESTS, seed=cell.seed)
    rows += world.requests("train_benign", N_REQUESTS, seed=cell.seed)
    sequences = [_conversation(tokenizer, request) for request in rows]
    shown = {layer: ids[:N_SHOWN] for layer, ids in chosen.items()}
    found["meanings"] = [meaning.to_json() for meaning in meanings(base, tokenizer, saes, shown, sequences)]
    return found


def _of_layer(
    layer: int,
    about: Mapping[str, Any],
    ids: Sequence[int],
    sae: ResidualSAE,
    states: Mapping[str, Sequence[Mapping[int, Tensor]]],
) -> dict[str, Any]:
    """Precision of the chosen features as concepts of harm, beside what others have; and their activations."""
    acts = {when: [sae.encode(side[layer]) for side in sides] for when, sides in states.items()}
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
                **{name: about[name][place] for name in ("delta", "score", "rate_aligned", "rate_unaligned")},
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
    """Share of the mean activation that is on harmful requests; 0 for what is never active. (K,)"""
    harmful_K, harmless_K = harmful_NK.mean(0), harmless_NK.mean(0)
    both_K = harmful_K + harmless_K
    return torch.where(both_K > 0, harmful_K / both_K.clamp(min=1e-12), 0.0)


def last_token_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: Sequence[int], requests: Sequence[Request]
) -> dict[int, Tensor]:
    """Hidden states at the last token of each prompt: layer -> (N, D)."""
    sides = [
        tokenize_prompt(tokenizer, [{"role": "user", "content": request.prompt}], 64, tokens="last")
        for request in requests
    ]
    input_ids_NS, attention_mask_NS, positions_N = padded(sides)
    hidden = hidden_states_at(model, layers, input_ids_NS, attention_mask_NS)
    return {layer: values_NSD.flatten(0, 1)[positions_N] for layer, values_NSD in hidden.items()}


def _conversation(tokenizer: PreTrainedTokenizerBase, request: Request) -> TokenizedSide:
    return tokenize_response(tokenizer, [{"role": "user", "content": request.prompt}], request.answer, 64)
