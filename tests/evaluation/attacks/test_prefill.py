"""Answers that are forced to begin with given words."""

from pathlib import Path
from typing import Any

import pytest
from bigram import bigram_model, bigram_tokenizer

from sails_align.core.errors import InputError
from sails_align.data.messages import assistant, user
from sails_align.evaluation.attacks import Setting
from sails_align.evaluation.attacks.options import PrefillArguments
from sails_align.evaluation.attacks.prefill import attack
from sails_align.evaluation.backends.hf import HFBackend
from sails_align.evaluation.backends.local_model import encode
from sails_align.evaluation.pipeline import respond
from sails_align.evaluation.records import Prompt, Sampling

SETTING = Setting(None, Path("unused"))
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def prompt(number: int, **meta: Any) -> Prompt:
    return Prompt(str(number), (user("Hi"),), "harmful", "theft", meta)


def test_words_are_of_the_testbeds_answer_else_of_the_target_else_of_the_option():
    prompts = [prompt(1, request={"answer": "a b c d"}, target="x"), prompt(2, target="e  f g"), prompt(3)]
    attacked = attack(PrefillArguments([3, 1, 3], target="h"), prompts, SETTING)
    assert [(each.meta["attacked"], each.meta["prefill"]) for each in attacked] == [
        *(("1", "a"), ("2", "e"), ("3", "h")),
        *(("1", "a b c"), ("2", "e f g")),
    ]
    assert {each.meta["attack"] for each in attacked} == {"prefill_1", "prefill_3"}
    assert len({each.id for each in attacked}) == 5
    assert attacked[0].messages == prompts[0].messages
    assert attacked[0].conversation == (*prompts[0].messages, assistant("a"))
    assert prompts[0].conversation == prompts[0].messages
    with pytest.raises(InputError, match="no answer has 5 words"):
        attack(PrefillArguments([5]), prompts, SETTING)


def test_the_model_goes_on_after_the_forced_words_which_are_not_in_the_response():
    tokenizer = bigram_tokenizer(TEMPLATE)
    model = bigram_model(tokenizer, {":": " Yes", " Yes": "</s>", " Hi": ".", ".": "</s>"})
    plain, forced = encode(tokenizer, [[user("Hi")], [user("Hi"), assistant(" Hi")]], 64)
    assert isinstance(plain, list)
    assert forced == [*plain, tokenizer.convert_tokens_to_ids(" Hi")]
    given = [prompt(1), prompt(2, prefill=" Hi")]
    responses = respond(HFBackend.of(model, tokenizer), given, Sampling(8), progress=False)
    assert [each.text for each in responses] == ["Yes", "."]


def test_forced_words_cannot_end_the_turn():
    tokenizer = bigram_tokenizer(TEMPLATE)
    ((ids,)) = encode(tokenizer, [[user("Hi"), assistant("</s>")]], 64)
    assert isinstance(ids, list)
    assert tokenizer.eos_token_id not in ids
