"""Describe features by their texts, promoted words, neighbours, and how training changed their activations.

Shapes: N sequences, S sequence, T tokens of all sequences, D d_model, F d_sae, K features, V vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.core.files import cache_folder
from sails_align.data.tokens import TokenizedSide, padded
from sails_align.models.hooks import evaluation_mode, token_states
from sails_align.saes.load import ResidualSAE

N_CONTEXTS, N_WORDS, N_NEIGHBOURS = 3, 6, 3
BATCH_SIZE = 16
N_ENCODED = 2048
"""Tokens encoded at a time."""
NEURONPEDIA = "https://www.neuronpedia.org"


@dataclass(frozen=True)
class Context:
    """A text in which a feature is active."""

    tokens: list[str]
    activations: list[float]
    """Activation of the feature at each token."""


@dataclass(frozen=True)
class Meaning:
    """Observations about a feature."""

    layer: int
    id: int
    contexts: list[Context]
    """Texts with the highest activation, each once."""
    promoted: list[str]
    """Tokens whose logits the decoder direction raises most (logit lens)."""
    suppressed: list[str]
    neighbours: list[tuple[int, float]]
    """The latents with the closest decoder directions, and their cosines."""
    neuronpedia: str | None
    """Address of its page, if the SAE is public and has one."""
    label: str | None
    """Neuronpedia's explanation, if it is in the cache (`neuronpedia_label`)."""


@torch.no_grad()
def meanings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saes: Mapping[int, ResidualSAE],
    features: Mapping[int, Sequence[int]],
    sequences: Sequence[TokenizedSide],
) -> list[Meaning]:
    """Describe the features (layer -> ids), in the given order, by texts in which they are active."""
    found = []
    activations = activations_of(model, saes, features, sequences)
    for layer, ids in features.items():
        promoted_VK = logit_lens(model, normalize(saes[layer].W_dec_FD[list(ids)], dim=1))
        for place, feature in enumerate(ids):
            acts = [of[:, place] for of in activations[layer]]
            best = sorted(range(len(acts)), key=lambda index: -acts[index].max().item())[:N_CONTEXTS]
            order_V = promoted_VK[:, place].argsort(descending=True)
            found.append(
                Meaning(
                    layer,
                    feature,
                    [
                        Context(
                            words(tokenizer, sequences[index].input_ids),
                            [round(value, 3) for value in acts[index].tolist()],
                        )
                        for index in best
                        if acts[index].max() > 0
                    ],
                    words(tokenizer, order_V[:N_WORDS].tolist()),
                    words(tokenizer, order_V.flip(0)[:N_WORDS].tolist()),
                    neighbours(saes[layer].W_dec_FD, feature),
                    neuronpedia_page(saes[layer], feature),
                    neuronpedia_label(saes[layer], feature),
                )
            )
    return found


def excerpt(tokens: Sequence[str], activations: Sequence[float], n_before: int = 8) -> str:
    """Return the end of a text up to the token with the highest activation, which is in brackets."""
    peak = max(range(len(tokens)), key=activations.__getitem__)
    start = max(0, peak - n_before)
    gap = "" if any(token[:1].isspace() for token in tokens[1:]) else " "  # where tokens are words, without spaces
    before, token = gap.join(tokens[start:peak]), tokens[peak]
    text = f"{'... ' if start else ''}{before}{gap}{token[: len(token) - len(token.lstrip())]}[{token.strip()}]"
    return " ".join(text.split())


def words(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """Return each token as text."""
    return [str(tokenizer.decode([token])) for token in token_ids]


@torch.no_grad()
def activations_of(
    model: PreTrainedModel,
    saes: Mapping[int, ResidualSAE],
    features: Mapping[int, Sequence[int]],
    sequences: Sequence[TokenizedSide],
) -> dict[int, list[Tensor]]:
    """Return the activations of the features at every token: layer -> for each sequence (S, K).

    The first token, on which SAEs are not trained, counts as 0.
    """
    found: dict[int, list[Tensor]] = {layer: [] for layer in features}
    with evaluation_mode(model):
        for start in range(0, len(sequences), BATCH_SIZE):
            batch = sequences[start : start + BATCH_SIZE]
            input_ids_NS, attention_mask_NS, _ = padded(batch)
            hidden = token_states(model, list(features), input_ids_NS, attention_mask_NS, attention_mask_NS)
            lengths = [len(sequence.input_ids) for sequence in batch]
            for layer, ids in features.items():
                parts = hidden[layer].float().split(N_ENCODED)
                acts_TK = torch.cat([saes[layer].encode(part_TD)[:, list(ids)].cpu() for part_TD in parts])
                for acts_SK in acts_TK.split(lengths):
                    acts_SK[0] = 0.0
                    found[layer].append(acts_SK)
    return found


@torch.no_grad()
def logit_lens(model: PreTrainedModel, directions_KD: Tensor) -> Tensor:
    """Return what adding a direction to the last residual does to the logits, (V, K), without the norm's scale."""
    norm: Any = model.get_decoder().norm
    weight = next(norm.parameters())
    gain_D = norm(torch.ones(1, len(weight), dtype=weight.dtype, device=weight.device))[0].float()
    head_VD = model.get_output_embeddings().weight.float()  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    return (head_VD @ (directions_KD.to(head_VD.device) * gain_D).T).cpu()


def neighbours(W_dec_FD: Tensor, feature: int) -> list[tuple[int, float]]:
    """Find the latents whose decoder directions are closest to a feature's, with their cosines."""
    directions_FD = normalize(W_dec_FD, dim=1)
    cosines_F = directions_FD @ directions_FD[feature]
    cosines_F[feature] = -2.0
    values, ids = cosines_F.topk(min(N_NEIGHBOURS, len(cosines_F) - 1))
    return [(int(id_), round(value, 3)) for id_, value in zip(ids, values.tolist(), strict=True)]


def neuronpedia_page(sae: ResidualSAE, feature: int) -> str | None:
    """Return the address of the feature's page, if sae-lens knows one for its SAE."""
    name = neuronpedia_id(sae)
    return None if name is None else f"{NEURONPEDIA}/{name}/{feature}"


def neuronpedia_label(sae: ResidualSAE, feature: int) -> str | None:
    """Return the first explanation in neuronpedia/<SAE>/<feature>.json of the cache folder; None without that file.

    The file is the answer of Neuronpedia's `api/feature/<SAE>/<feature>`. The network is not used.
    """
    name = Path(neuronpedia_id(sae) or "..")
    if name.is_absolute() or ".." in name.parts:  # an SAE's file can say anything
        return None
    path = cache_folder() / "neuronpedia" / name / f"{feature}.json"
    try:
        explanations = json.loads(path.read_text(encoding="utf-8"))["explanations"]
        return str(explanations[0]["description"]) if explanations else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} is no answer of Neuronpedia's api/feature ({error}); delete it") from error


def neuronpedia_id(sae: ResidualSAE) -> str | None:
    """Return Neuronpedia's name of an SAE, as sae-lens knows it."""
    return getattr(sae.sae.cfg.metadata, "neuronpedia_id", None)
