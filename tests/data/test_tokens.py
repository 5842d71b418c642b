"""Masks hold exactly the text they should, on a real tokenizer and on tiny ones, under several kinds of template."""

from pathlib import Path

import datasets
import pytest
from bigram import bigram_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import GEMMA, TEMPLATE, THINKING, TOKENIZERS, TURNS, WORDS, byte_level, word_level
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sails_align.core.errors import InputError
from sails_align.data.loading import load_rows
from sails_align.data.pairs import normalize
from sails_align.data.tokens import (
    APART,
    TokenizedSide,
    as_text,
    check_chat_template,
    content_token_mask,
    control_tokens,
    read_chat_template,
    tokenize_prompt,
    tokenize_response,
    turn_end,
    turn_openers,
)
from sails_align.evaluation.backends.local_model import encode

QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_template_file_with_a_bom(tmp_path: Path, encoding: str):
    path = tmp_path / "t.jinja"
    path.write_text(GEMMA, encoding=encoding)
    assert read_chat_template(str(path)) == GEMMA


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message['content'] }",
        "{{ messages[0].missing.part }}",
        "{{ messages[0] + 1 }}",
        "{{ 1 // 0 }}{{ messages }}",
        "{{ raise_exception('no') }}{{ messages }}",
    ],
)
def test_a_template_that_fails(template: str):
    with pytest.raises(InputError) as error:
        check_chat_template(word_level(template))
    check_message(error, "refuses a conversation of user", "--chat_template_path FILE")


@pytest.fixture(scope="module")
def stories(shared: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260k")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def masked_text(tokenizer: PreTrainedTokenizerBase, side: TokenizedSide) -> str:
    ids = [token for token, inside in zip(side.input_ids, side.mask, strict=True) if inside]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def n_bos(tokenizer: PreTrainedTokenizerBase, side: TokenizedSide) -> int:
    return side.input_ids.count(tokenizer.bos_token_id)


# ------------------------------------------------------------------------------------------------ the shipped template


def test_template_text(stories: PreTrainedTokenizerBase):
    system = {"role": "system", "content": "Be\nkind."}
    rendered = stories.apply_chat_template([system, *TURNS], tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<s>\n\nSystem: Be\nkind.\n\nHuman: How are you?\n\nAssistant: Fine.</s>"
        "\n\nHuman: Tell me more, please\n\nAssistant:"
    )
    with pytest.raises(InputError, match="the role tool is none of system, user, assistant"):
        tokenize_response(stories, [{"role": "tool", "content": "x"}], "y", 99)


def test_template_without_special_tokens():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    rendered = bare.apply_chat_template(TURNS[:2], chat_template=TEMPLATE, tokenize=False)
    assert rendered == "\n\nHuman: How are you?\n\nAssistant: Fine."


def test_template_marks_the_response_and_its_end_for_training(stories: PreTrainedTokenizerBase):
    encoded = stories.apply_chat_template(TURNS[:2], return_assistant_tokens_mask=True, return_dict=True)
    trained = [token for token, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    assert stories.decode(trained) == "Fine.</s>"


@QUICK
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_generation_prompt_is_a_prefix(stories: PreTrainedTokenizerBase, response: str):
    """What the model is given to answer is, token for token, what stands before the answer in training."""
    prompt = stories.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    full = stories.apply_chat_template([*TURNS, {"role": "assistant", "content": response}], return_dict=False)
    assert full[: len(prompt)] == prompt


# ----------------------------------------------------------------------------------------------------------- responses


@pytest.mark.parametrize("name", TOKENIZERS)
@QUICK
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))
def test_response_mask_is_the_response(name: str, words: list[str]):
    """Also where the response says what the prompt or the template says ("model", "think", "Fine .")."""
    tokenizer, response = TOKENIZERS[name](), " ".join(words)
    side = tokenize_response(tokenizer, TURNS, response, 999)
    assert masked_text(tokenizer, side).strip() == response
    last = max(i for i, inside in enumerate(side.mask) if inside)
    assert all(side.mask[last + 1 - sum(side.mask) : last + 1])  # one run, at the end of the sequence
    assert not side.mask[-1]
    assert "Fine" not in tokenizer.decode(side.input_ids[last + 1 :])
    assert n_bos(tokenizer, side) == 1 or tokenizer("")["input_ids"] == []


@QUICK
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_response_mask_on_a_real_tokenizer(stories: PreTrainedTokenizerBase, response: str):
    side = tokenize_response(stories, TURNS, response, 999)
    decoded = masked_text(stories, side)
    special = [str(stories.decode([token])) for token in stories.all_special_ids]
    if not any(token in response for token in special):
        assert decoded.removeprefix(" ") == response.removeprefix(" ")
    assert side.input_ids.count(stories.bos_token_id) == 1
    assert (side.input_ids[-1], side.mask[-1]) == (stories.eos_token_id, False)


def test_real_pairs_on_a_real_tokenizer(
    stories: PreTrainedTokenizerBase, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows = load_rows(str(shared / "data/hh_rlhf/harmless-base.test.jsonl.gz"), split="train[:60]")
    for row in normalize(rows).dataset:
        side = tokenize_response(stories, row["prompt"], row["chosen"], 4000)
        assert masked_text(stories, side) == row["chosen"]
        prompt = tokenize_prompt(stories, row["prompt"], 4000)
        assert masked_text(stories, prompt) == row["prompt"][-1]["content"]
        assert n_bos(stories, side) == n_bos(stories, prompt) == 1


def test_merges_over_the_border():
    """A token that holds the end of the template and the start of the response counts as the response's."""
    tokenizer = byte_level(TEMPLATE, merging=True)
    turns = [{"role": "user", "content": "How are you?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    side = tokenize_response(tokenizer, turns, "Fine.", 999)
    assert side.input_ids[: len(prompt)] != prompt  # a count of the prompt's tokens would be wrong
    assert masked_text(tokenizer, side).endswith(": Fine.")
    assert sum(side.mask) < len(side.mask) - 1


def test_trimming_template_and_special_tokens_in_the_text():
    tokenizer = word_level(GEMMA)
    side = tokenize_response(tokenizer, TURNS, "  I will <eos> not <bos> tell\n", 999)
    assert masked_text(tokenizer, side) == "I will not tell"
    assert content_token_mask(tokenizer, [0, 1, 2, 3, 4, 5, 6, 8]) == [False] * 6 + [True, True]
    empty = tokenize_response(tokenizer, TURNS, "<end_of_turn>", 999)
    assert not any(empty.mask)


def test_truncation():
    tokenizer = word_level(GEMMA)
    whole = tokenize_response(tokenizer, TURNS, "I will not", 999)
    for length in range(1, len(whole.input_ids) + 1):
        cut = tokenize_response(tokenizer, TURNS, "I will not", length)
        assert (cut.input_ids, cut.mask) == (whole.input_ids[:length], whole.mask[:length])
    assert not any(tokenize_response(tokenizer, TURNS, "I will not", 5).mask)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", [GEMMA, THINKING])
def test_bos_exactly_once(template: str, adds_bos: bool):
    """Written by the template, or else added where the tokenizer adds it to plain text; never twice."""
    tokenizer = word_level(template, adds_bos)
    expected = 1 if adds_bos or template == GEMMA else 0
    for side in (tokenize_response(tokenizer, TURNS, "Fine", 99), tokenize_prompt(tokenizer, TURNS, 99)):
        assert n_bos(tokenizer, side) == expected
        assert (side.input_ids[0] == tokenizer.bos_token_id) == bool(expected)
        assert len(side.input_ids) == len(side.mask)
        assert not side.mask[0]


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", TOKENIZERS)
@QUICK
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))
def test_prompt_mask_is_the_last_user_turn(name: str, words: list[str]):
    tokenizer, content = TOKENIZERS[name](), " ".join(words)
    prompt = [*TURNS[:2], {"role": "user", "content": content}]
    side = tokenize_prompt(tokenizer, prompt, 999)
    assert masked_text(tokenizer, side).strip() == content
    last = tokenize_prompt(tokenizer, prompt, 999, tokens="last")
    assert last.input_ids == side.input_ids
    assert last.mask == [False] * (len(side.mask) - 1) + [True]
    answer = tokenize_response(tokenizer, prompt, "Fine", 999)
    if name.startswith("words"):  # the position from which the answer is predicted
        assert answer.input_ids[: len(side.input_ids)] == side.input_ids


def test_last_token_is_gone_after_truncation():
    tokenizer = word_level(GEMMA)
    n_tokens = len(tokenize_prompt(tokenizer, TURNS, 999).input_ids)
    assert sum(tokenize_prompt(tokenizer, TURNS, n_tokens, tokens="last").mask) == 1
    assert sum(tokenize_prompt(tokenizer, TURNS, n_tokens - 1, tokens="last").mask) == 0


# --------------------------------------------------------------------------------------------------- the ends of turns

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "ends", "openers"),
    [
        (TEMPLATE, ["</s>"], ["\n\nAssistant:", "\n\nHuman:"]),
        (CHATML, ["<|im_end|>"], []),
        (LLAMA_2, ["</s>"], [" [/INST]"]),
        (VICUNA, ["</s>"], [" ASSISTANT:", "USER:"]),
        (BARE, [], []),  # "user" alone may stand in a response
    ],
)
def test_what_ends_a_turn_and_what_begins_one(template: str, ends: list[str], openers: list[str]):
    tokenizer = bigram_tokenizer(template)
    assert tokenizer.convert_ids_to_tokens(turn_end(tokenizer)) == ends
    assert turn_openers(tokenizer) == openers


@pytest.mark.parametrize("text", ["a </s> b", "<s>", "</s></s>", "<unk> <s"])
def test_special_tokens_in_a_text_are_text(stories: PreTrainedTokenizerBase, text: str):
    """In a prompt, in a response, and in what is asked: no control token comes of them."""
    turns = [{"role": "user", "content": text}]
    plain = tokenize_response(stories, [{"role": "user", "content": "a"}], "b", 999)
    side = tokenize_response(stories, turns, text, 999)
    for token_id in stories.all_special_ids:
        assert side.input_ids.count(token_id) == plain.input_ids.count(token_id)
    assert masked_text(stories, side).replace(APART, "") == text
    ((asked,)) = encode(stories, [turns], 999)
    assert asked.count(stories.eos_token_id) == 0
    assert asked.count(stories.bos_token_id) == 1
    again = as_text(as_text(turns, control_tokens(stories)), control_tokens(stories))
    assert again == as_text(turns, control_tokens(stories)) != turns or text == "<unk> <s"


def test_the_end_of_gemmas_turn():
    tokenizer = word_level(GEMMA)
    assert tokenizer.convert_ids_to_tokens(turn_end(tokenizer)) == ["<end_of_turn>"]
    assert turn_openers(tokenizer) == []


# ----------------------------------------------------------------------------------------------------------- bad input


def check_message(error: pytest.ExceptionInfo, *parts: str) -> None:
    assert len(str(error.value).splitlines()) <= 3
    for part in parts:
        assert part in str(error.value)


def test_no_chat_template():
    tokenizer = word_level(GEMMA)
    tokenizer.chat_template = None
    for tokenize in (lambda: tokenize_prompt(tokenizer, TURNS, 9), lambda: tokenize_response(tokenizer, TURNS, "a", 9)):
        with pytest.raises(InputError) as error:
            tokenize()
        check_message(error, "no chat template", "--chat_template_path human_assistant")


def test_template_that_refuses_the_roles():
    with pytest.raises(InputError) as error:
        tokenize_prompt(word_level(GEMMA), [{"role": "system", "content": "Be kind."}, *TURNS], 99)
    check_message(error, "System role not supported", "system, user, assistant, user", "--chat_template_path")


@pytest.mark.parametrize(
    "template",
    ["{{ bos_token }}{{ messages[0]['content'] }}", "{% for m in messages %}{{ m['content'] | upper }} {% endfor %}"],
)
def test_template_that_loses_or_rewrites_the_response(template: str):
    tokenizer = word_level(template)
    with pytest.raises(InputError) as error:
        tokenize_response(tokenizer, TURNS, "Fine", 99)
    check_message(error, "rewrites the assistant turn", "--chat_template_path")
