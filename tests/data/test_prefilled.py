"""Tokens and labels of examples that begin with a given text, under several tokenizers and templates."""

from functools import cache
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import TOKENIZERS, TURNS, WORDS
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from sails_align.core.errors import InputError
from sails_align.data.messages import assistant
from sails_align.data.pairs import to_sft
from sails_align.data.prefilled import (
    IGNORED,
    check_transitions,
    first_token,
    response_of,
    to_tokens,
    tokens_and_labels,
    without_cut,
)
from sails_align.data.tokens import render, tokenize_response

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.lists(st.sampled_from([word for word in WORDS if word.isalpha()]), min_size=1, max_size=6).map(" ".join)
REFUSAL = "I will not tell"


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return TOKENIZERS[name]()


def row(prefill: str = "", transition: str | None = None, chosen: str = REFUSAL) -> dict[str, Any]:
    return {"prompt": TURNS, "chosen": chosen, "prefill": prefill, "transition": transition}


@pytest.mark.parametrize("name", TOKENIZERS)
@QUICK
@given(harmful=TEXTS)
def test_at_every_token_of_a_harmful_answer_and_at_its_end_the_refusal_begins(name: str, harmful: str):
    tokenizer = tokenizer_of(name)
    ids, labels = tokens_and_labels(tokenizer, row(harmful, REFUSAL))
    side = tokenize_response(tokenizer, TURNS, harmful, 999)
    assert ids == side.input_ids[-len(ids) :]  # discovery may put a BOS before it
    content = side.mask[-len(ids) :]
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    first, n = content.index(True), sum(content)
    assert places == list(range(first, first + n + 1)), "the harmful answer, and the token that ends it"
    refused = tokenize_response(tokenizer, TURNS, REFUSAL, 999)
    assert {labels[place] for place in places} == {refused.input_ids[refused.mask.index(True)]}
    prompt = render(tokenizer, TURNS, add_generation_prompt=True)
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if "thinking" not in name:  # where the template writes more before the response than it is given
        assert ids[: len(asked)] == asked
        assert not str(tokenizer.decode(ids[len(asked) : first])).strip(), "the prompt's end predicts the first label"


@pytest.mark.parametrize("name", TOKENIZERS)
@QUICK
@given(prefill=TEXTS)
def test_after_a_prefill_the_whole_refusal_and_its_end_are_learned_and_nothing_else(name: str, prefill: str):
    tokenizer = tokenizer_of(name)
    ids, labels = tokens_and_labels(tokenizer, row(prefill))
    n = labels.count(IGNORED)
    assert labels == [IGNORED] * n + ids[n:]
    whole = render(tokenizer, [*TURNS, assistant(f"{prefill} {REFUSAL}")], add_generation_prompt=False)
    before, _, learned = whole.rpartition(f"{prefill} {REFUSAL}")
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    read = tokenizer(before + prefill, add_special_tokens=False)["input_ids"]
    assert ids[:n] == read, "what a model is given under a prefill attack"
    assert str(tokenizer.decode(ids[n:])).strip().startswith(REFUSAL)
    assert "Fine" not in tokenizer.decode(ids[n:])
    assert learned


@pytest.mark.parametrize("name", ["words, Gemma", "bytes, Human"])
def test_without_a_prefill_tokens_and_labels_are_trls(name: str):
    tokenizer = tokenizer_of(name)
    rows = Dataset.from_list([row(chosen=text) for text in (REFUSAL, "Fine", "tell me more")])
    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer.chat_template, trainer.completion_only_loss = None, True
    args = SFTConfig(output_dir="unused", max_length=None, use_cpu=True, bf16=False)
    made: Any = trainer._prepare_dataset(to_sft(rows), tokenizer, args, False, None, "train")
    found = to_tokens(rows, tokenizer)
    assert [list(map(list, pair)) for pair in zip(found["input_ids"], found["labels"], strict=True)] == [
        [each["input_ids"], each["labels"]] for each in made
    ]


def test_special_tokens_in_a_prefill_stay_text():
    tokenizer = tokenizer_of("words, Gemma")
    ids, labels = tokens_and_labels(tokenizer, row("tell <eos> me"))
    assert tokenizer.eos_token_id not in ids
    assert str(tokenizer.decode([label for label in labels if label != IGNORED])).startswith(REFUSAL)
    _, labels = tokens_and_labels(tokenizer, row("tell <eos> me", REFUSAL))
    assert set(labels) == {IGNORED, first_token(tokenizer, TURNS, REFUSAL)}


def test_the_whole_response():
    assert response_of({"chosen": "a"}) == response_of(row(chosen="a")) == "a"
    assert response_of(row("b", chosen="a")) == "b a"
    assert response_of(row("b", "a", chosen="a")) == "b"


def test_refusals_that_begin_differently_are_explained_and_a_named_one_must_be_theirs():
    tokenizer = tokenizer_of("words, Gemma")
    starts = Dataset.from_list([row("tell me", text, text) for text in ("I will", "I will not", "not me")])
    with pytest.raises(InputError, match=r"2 different tokens \('I' 2, 'not' 1\);\n.*--derta_refusal"):
        check_transitions(starts, tokenizer)
    named = [row("tell me", "not", text) for text in ("I will", "not me")]
    check_transitions(Dataset.from_list(named), tokenizer)
    check_transitions(Dataset.from_list([row("tell me")]), tokenizer)
    with pytest.raises(InputError, match="derta_refusal is 'more', but no refusal begins like that"):
        check_transitions(Dataset.from_list([row("tell me", "more", "I will")]), tokenizer)


def test_rows_whose_refusal_is_cut_off_are_left_out():
    tokenizer = tokenizer_of("words, Gemma")
    given = [row("tell me"), row("tell me more"), row("tell me more"), row("tell me more", "I"), row()]
    rows = Dataset.from_list(given)
    lengths = [len(tokens_and_labels(tokenizer, each)[0]) for each in given]
    assert without_cut(rows, tokenizer, None) is without_cut(rows, tokenizer, max(lengths)) is rows
    assert without_cut(rows, tokenizer, lengths[0]).to_list() == [given[0], given[3], given[4]]
    assert without_cut(rows, tokenizer, 1).to_list() == [given[3], given[4]], "what TRL cuts itself"
