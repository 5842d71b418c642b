"""The margin is of the first tokens of responses, and the prompt's tokens are those that discovery looks at."""

from pathlib import Path

import pytest
import torch
from tiny import SENTENCES, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sails_align.data.messages import user
from sails_align.data.tokens import tokenize_prompt, tokenize_response
from sails_align.subspace.margin import N_TOKENS, begun_response, margin_term

PROMPT, REFUSAL, ANSWER = [user(SENTENCES[1])], SENTENCES[2], SENTENCES[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("margin")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def words(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[bool]) -> list[str]:
    return [tokenizer.convert_ids_to_tokens(token) for token, is_in in zip(ids, mask, strict=True) if is_in]


@pytest.mark.parametrize("prompt_tokens", ["last", "all"])
def test_what_is_scored_and_what_is_looked_at(tokenizer: PreTrainedTokenizerBase, prompt_tokens: str):
    begun = begun_response(tokenizer, PROMPT, REFUSAL, 64, prompt_tokens=prompt_tokens)
    assert words(tokenizer, begun.input_ids, begun.mask) == REFUSAL.split()[:N_TOKENS]
    assert begun.mask[-1], "nothing after the scored tokens is run"
    assert begun.looked_at["response"] == begun.mask
    prompt = tokenize_prompt(tokenizer, PROMPT, 64, tokens=prompt_tokens)
    n = len(prompt.input_ids)
    assert begun.input_ids[:n] == prompt.input_ids
    assert begun.looked_at["prompt"] == prompt.mask + [False] * (len(begun.mask) - n)


def test_a_short_response_has_fewer_tokens_and_one_cut_off_has_none(tokenizer: PreTrainedTokenizerBase):
    assert sum(begun_response(tokenizer, PROMPT, "you can", 64).mask) == 2
    n = len(tokenize_prompt(tokenizer, PROMPT, 64).input_ids)
    assert sum(begun_response(tokenizer, PROMPT, REFUSAL, n + 1).mask) == 1
    assert not any(begun_response(tokenizer, PROMPT, REFUSAL, n).mask)


def test_the_margin_is_the_mean_log_probability_of_each_sequence_alone(folder: Path, tokenizer):
    """Against the plainest way: the whole model, one sequence at a time, all logits."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    prompts = [PROMPT, [user(f"{SENTENCES[0]} 7 8 9")], [user("3")]]
    batch = [begun_response(tokenizer, prompt, answer, 64) for prompt in prompts for answer in (REFUSAL, "you can")]
    expected = 0.0
    for sequence in batch:
        ids_BS = torch.tensor([sequence.input_ids])
        log_probs_SV = model(input_ids=ids_BS).logits[0].log_softmax(-1)
        places = [place for place, is_in in enumerate(sequence.mask) if is_in]
        own = [log_probs_SV[place - 1, sequence.input_ids[place]].item() for place in places]
        expected += sum(own) / len(own)
    assert margin_term(model, batch, 1.0).item() == pytest.approx(expected, abs=1e-10)
    assert margin_term(model, batch, -1.0).item() == pytest.approx(-expected, abs=1e-10)


def test_low_precision_models_have_a_margin_in_float32(folder: Path, tokenizer):
    batch = [begun_response(tokenizer, PROMPT, REFUSAL, 64)]
    model = AutoModelForCausalLM.from_pretrained(folder)
    exact = margin_term(model, batch, 1.0)
    term = margin_term(model.bfloat16(), batch, 1.0)
    assert term.dtype == torch.float32
    assert term.item() == pytest.approx(exact.item(), rel=0.02)


def test_the_template_s_end_is_not_part_of_the_margin(tokenizer: PreTrainedTokenizerBase):
    whole = tokenize_response(tokenizer, PROMPT, ANSWER, 64)
    begun = begun_response(tokenizer, PROMPT, ANSWER, 64)
    assert tokenizer.eos_token_id in whole.input_ids
    assert tokenizer.eos_token_id not in begun.input_ids
