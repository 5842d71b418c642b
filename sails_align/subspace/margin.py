"""Tokenize how a response begins, for the refusal margin, and compute the margin's terms.

The margin of a harmful request is how much likelier the chosen response (a refusal) is than the rejected one, by the
first tokens of each:

    M = mean over the first tokens of log p(chosen token) - the same of the rejected response

Its two terms are of different sequences, so each is computed from its own, with its sign.

Shapes: B batch, S sequence, K positions of which there are logits, V vocabulary, N tokens of all responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sails_align.data.messages import Message
from sails_align.data.tokens import TokenizedSide, padded, tokenize_prompt, tokenize_response

N_TOKENS = 5
"""Tokens of a response in the margin: a refusal shows in the first few (Qi et al. 2024, arXiv 2406.05946)."""
SIGNS = {"aligned": 1.0, "unaligned": -1.0}
"""Of the terms: chosen and rejected responses."""


@dataclass(frozen=True)
class BegunResponse(TokenizedSide):
    """A request and the first tokens of a response; the mask holds those tokens."""

    looked_at: dict[str, list[bool]]
    """Contrast -> mask of the tokens at which features are looked at."""


def begun_response(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    response: str,
    max_length: int,
    *,
    prompt_tokens: str = "last",
    n_tokens: int = N_TOKENS,
) -> BegunResponse:
    """Tokenize a request and the first `n_tokens` tokens of a response; all masks are empty if none is left.

    Features are looked at in the tokens of the response, and in those of the prompt: with `last` the one that predicts
    the response's first token, with `all` the content tokens of the last user turn. Raises `InputError` as
    `tokenize_response`.
    """
    side = tokenize_response(tokenizer, prompt, response, max_length)
    places = [place for place, is_inside in enumerate(side.mask) if is_inside][:n_tokens]
    if not places or places[0] == 0:
        return BegunResponse([], [], {})
    length = places[-1] + 1
    begun = [place in places for place in range(length)]
    asked = [place == places[0] - 1 for place in range(length)]
    if prompt_tokens == "all":
        turn = tokenize_prompt(tokenizer, prompt, max_length)
        same = zip(turn.input_ids, side.input_ids, turn.mask, strict=False)  # up to the response
        asked = [own == other and is_inside for own, other, is_inside in same][: places[0]]
        asked += [False] * (length - len(asked))
    return BegunResponse(side.input_ids[:length], begun, {"prompt": asked, "response": begun})


def margin_term(model: nn.Module, batch: Sequence[TokenizedSide], sign: float) -> Tensor:
    """Return one term of the margin, with its sign, summed over a batch of requests. ()

    Logits are computed for the tokens in the masks alone, and log-probabilities at least in float32.
    """
    input_ids_BS, attention_mask_BS, mask_BS = padded(batch)
    device = next(model.parameters()).device
    rows_N, places_N = mask_BS.nonzero(as_tuple=True)
    kept_K, columns_N = (places_N - 1).unique(return_inverse=True)  # a token is predicted at the one before it
    tokens_N = input_ids_BS[rows_N, places_N]
    inputs = {"input_ids": input_ids_BS.to(device), "attention_mask": attention_mask_BS.to(device)}
    logits_BKV = model(**inputs, logits_to_keep=kept_K.to(device), use_cache=False).logits
    logits_NV = logits_BKV[rows_N.to(logits_BKV.device), columns_N.to(logits_BKV.device)]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    log_probs_N = logits_NV.log_softmax(-1).gather(1, tokens_N[:, None].to(logits_NV.device)).squeeze(1)
    return sign * (log_probs_N / mask_BS.sum(1)[rows_N].to(log_probs_N)).sum()
