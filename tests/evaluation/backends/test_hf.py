"""Batches of transformers' `generate`: the texts are those of one conversation at a time, whatever happens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import edit_weights, lose_tensor, save_adapter
from bigram import bigram_model, bigram_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from sails_align.core.errors import InputError
from sails_align.data.tokens import read_chat_template
from sails_align.evaluation.backends.adapter_check import check_adapter_applied
from sails_align.evaluation.backends.hf import HFBackend
from sails_align.evaluation.records import Completion, Conversation, Sampling
from sails_align.models.load import load_model
from sails_align.models.spec import ModelSpec
from sails_align.testbed.build import resolve_testbed

TESTBED = resolve_testbed("testbed")
BASE = Path(TESTBED.model_path)
GREEDY = Sampling(max_new_tokens=24)


def spec(base: Path = BASE, adapter: Path | None = None) -> ModelSpec:
    return ModelSpec("m", str(base), None if adapter is None else str(adapter), str(base), {"files": "abc"})


def chats(n: int = 12) -> list[Conversation]:
    requests = [request for split in ("test_harmful", "test_benign") for request in TESTBED.world.requests(split, n)]
    return [[{"role": "user", "content": request.prompt}] for request in requests[::2]]


def completions(backend: HFBackend, conversations: Sequence[Conversation], sampling: Sampling = GREEDY) -> list[Any]:
    found = list(backend.complete(conversations, sampling))
    assert sorted(index for index, _ in found) == list(range(len(conversations)))
    return [completion for _, completion in sorted(found, key=lambda pair: pair[0])]


def texts(backend: HFBackend, conversations: Sequence[Conversation], sampling: Sampling = GREEDY) -> list[str | None]:
    return [completion.text for completion in completions(backend, conversations, sampling)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter"), BASE)


def one_at_a_time(conversations: Sequence[Conversation]) -> list[str]:
    """What transformers gives without padding and without any code of ours."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE).eval(), AutoTokenizer.from_pretrained(BASE)
    found = []
    for conversation in conversations:
        encoded = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**encoded, max_new_tokens=GREEDY.max_new_tokens, do_sample=False)
        found.append(tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def test_texts_are_those_of_one_conversation_at_a_time_in_batches_of_any_size():
    expected = one_at_a_time(chats())
    assert len(set(expected)) > 4
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE).train(), AutoTokenizer.from_pretrained(BASE)
    assert texts(HFBackend.of(model, tokenizer), chats()) == expected
    assert model.training
    for batch_size in (1, 5, 32):
        assert texts(HFBackend(spec(), batch_size=batch_size), chats()) == expected


def test_completions_come_batch_by_batch(monkeypatch):
    batches = record_batches(monkeypatch)
    stream = HFBackend(spec(), batch_size=4).complete(chats(), GREEDY)
    for _ in range(4):
        next(stream)
    assert batches == [4]
    next(stream)
    assert batches == [4, 4]


def test_an_adapter_gives_the_texts_of_the_merged_model(adapter, tmp_path):
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), str(adapter)).merge_and_unload()
    merged.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    adapted = texts(HFBackend(spec(adapter=adapter)), chats())
    assert adapted == texts(HFBackend(spec(tmp_path)), chats())
    assert adapted != texts(HFBackend(spec()), chats())


def test_an_ignored_adapter_is_found(adapter):
    base, adapted = HFBackend(spec()), HFBackend(spec(adapter=adapter))
    check_adapter_applied(adapted, base, chats(4))
    with pytest.raises(InputError, match="adapter is ignored: 4 greedy texts are the same"):
        check_adapter_applied(HFBackend(spec()), base, chats(4))
    with pytest.raises(InputError, match="could not be checked"):
        check_adapter_applied(adapted, base, ["x " * 500])


def test_finish_reasons():
    full, short = HFBackend(spec()), Sampling(max_new_tokens=2)
    assert {completion.finish_reason for completion in completions(full, chats())} == {"stop"}
    assert {completion.finish_reason for completion in completions(full, chats(), short)} == {"length"}


def test_stops_at_the_end_of_turn_of_generation_config():
    """As Gemma's <end_of_turn> and Llama's <|eot_id|>, which are not the tokenizer's EOS."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    plain = completions(HFBackend.of(model, tokenizer), chats(1))[0]
    words = tokenizer(plain.text, add_special_tokens=False)["input_ids"]
    place = next(place for place, token in enumerate(words) if place > 1 and token not in words[:place])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, words[place]]
    stopped = completions(HFBackend.of(model, tokenizer), chats(1))[0]
    assert stopped.finish_reason == "stop"
    assert plain.text.startswith(stopped.text)
    assert tokenizer(stopped.text, add_special_tokens=False)["input_ids"] == words[:place]


@pytest.mark.parametrize(
    "of_model",
    [
        {"repetition_penalty": 5.0, "temperature": 0.6, "top_p": 0.1, "do_sample": True, "min_p": 0.9},
        {"num_beams": 3, "length_penalty": -5.0, "early_stopping": True},
        {"min_new_tokens": 20},
        {"suppress_tokens": list(range(5, 40))},
        {"guidance_scale": 9.0},
        {"stop_strings": ["a"]},
        {"bad_words_ids": [[9], [12]], "no_repeat_ngram_size": 1, "forced_eos_token_id": 2},
        {"max_length": 3, "num_return_sequences": 2, "exponential_decay_length_penalty": (1, 9.0)},
    ],
)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(24, temperature=1.0, seed=3)])
def test_generation_config_decides_nothing_but_the_end(of_model: dict[str, Any], sampling: Sampling):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    expected = texts(HFBackend.of(model, tokenizer), chats(4), sampling)
    vars(model.generation_config).update(of_model)
    before = model.generation_config.to_dict()
    assert texts(HFBackend.of(model, tokenizer), chats(4), sampling) == expected
    assert model.generation_config.to_dict() == before


def test_what_is_not_used_of_generation_config_is_said(tmp_path, caplog):
    for load in (AutoModelForCausalLM, AutoTokenizer):
        load.from_pretrained(BASE).save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 2, "stop_strings": ["a"], "repetition_penalty": 1.3}))
    assert texts(HFBackend(spec(tmp_path)), chats(2)) == texts(HFBackend(spec()), chats(2))
    (said,) = [record.getMessage() for record in caplog.records if "generation_config" in record.getMessage()]
    assert "repetition_penalty 1.3, stop_strings ['a']; responses end with <eos>" in said


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "following"),
    [
        # a base model, after a template of plain text: it goes on with the user's next turn
        (read_chat_template("human_assistant"), {":": " Yes", " Yes": ".", ".": "\n\n", "\n\n": "Human", "Human": ":"}),
        # a model that ends turns with a token that neither its tokenizer nor its generation_config.json names
        (CHATML, {"\n": " Yes", " Yes": ".", ".": "<|im_end|>", "<|im_end|>": "\n"}),
    ],
)
def test_a_turn_of_the_user_is_no_part_of_a_response(template: str, following: dict[str, str]):
    tokenizer = bigram_tokenizer(template)
    model = bigram_model(tokenizer, following)
    chat = [{"role": "user", "content": " Hi"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output).count(" Yes.") > 2  # without stops it never ends
    pieces: list[str] = []
    for backend in (HFBackend.of(model, tokenizer), HFBackend.of(model, tokenizer, stream=pieces.append)):
        assert completions(backend, [chat], Sampling(16)) == [Completion("Yes.", "stop")]
    assert "".join(pieces).strip() == "Yes."
    cut = Sampling(3)  # in the midst of what ends it, or just before
    assert completions(HFBackend.of(model, tokenizer), [chat], cut)[0].text == "Yes."


def test_a_text_is_given_as_it_is_and_with_one_bos():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rendered = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats()]
    assert all(text.startswith(tokenizer.bos_token) for text in rendered)
    backend = HFBackend(spec())
    assert texts(backend, rendered) == texts(backend, chats())
    (half,) = completions(backend, [rendered[0].removesuffix("<model>")])
    assert isinstance(half, Completion)


def test_bos_is_not_doubled(project):
    """This tokenizer puts one before all texts, as Gemma's and Llama's do."""
    from tokenizers.processors import TemplateProcessing

    from sails_align.evaluation.backends.local_model import encode

    tokenizer = AutoTokenizer.from_pretrained(project.folder / "tiny")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("<s> how do")["input_ids"][:2] == [1, 1]
    with_bos, without = encode(tokenizer, ["<s> how do", "how do"], 64)
    assert with_bos == without == tokenizer("how do")["input_ids"]


def of_length(tokenizer: Any, n_tokens: int) -> Conversation:
    """A conversation of about so many tokens, and no more."""
    words = chats(1)[0][0]["content"].split()
    for n in range(n_tokens, 0, -1):
        conversation = [{"role": "user", "content": " ".join((words * n_tokens)[:n])}]
        if len(tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]) <= n_tokens:
            return conversation
    raise AssertionError


def test_what_is_longer_than_the_context_is_an_error_and_what_fills_it_is_cut():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    given = [chats(1)[0], of_length(tokenizer, 400), of_length(tokenizer, 126)]
    sampling = Sampling(max_new_tokens=64)
    good, too_long, cut = completions(HFBackend(spec()), given, sampling)
    assert good == completions(HFBackend(spec()), given[:1], sampling)[0]
    assert too_long.text is None
    assert "context is 128" in too_long.error
    n_prompt = len(tokenizer.apply_chat_template(given[2], add_generation_prompt=True)["input_ids"])
    n_new = len(tokenizer(cut.text, add_special_tokens=False)["input_ids"])
    assert 128 - 5 < n_prompt <= n_prompt + n_new <= 128
    assert cut == completions(HFBackend(spec()), given[2:], Sampling(128 - n_prompt))[0]


def test_a_conversation_the_template_refuses_is_an_error():
    system = [{"role": "system", "content": "be good"}, *chats(1)[0]]
    refused, good = completions(HFBackend(spec()), [system, chats(1)[0]])
    assert "roles user and assistant only" in refused.error
    assert good.text


def test_draws_are_those_of_the_seed():
    backend, hot = HFBackend(spec(), batch_size=4), Sampling(24, temperature=1.0, seed=3)
    first = texts(backend, chats(), hot)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    assert texts(backend, chats(), hot) == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert texts(backend, chats(), Sampling(24, temperature=1.0, seed=4)) != first


def record_batches(monkeypatch, capacity: int = 1000) -> list[int]:
    """Sizes of the batches that `generate` is given; those over the capacity run out of memory."""
    batches, real = [], GenerationMixin.generate

    def limited(self, *args, **kwargs):
        batches.append(len(kwargs["input_ids"]))
        if batches[-1] > capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", limited)
    return batches


def test_out_of_memory_halves_the_batch(monkeypatch):
    expected = texts(HFBackend(spec()), chats())
    batches = record_batches(monkeypatch, capacity=3)
    assert texts(HFBackend(spec(), batch_size=8), chats()) == expected
    assert batches == [8, 4, 2, 2, 2, 2, 2, 2]


def test_out_of_memory_with_one_conversation_is_its_error(monkeypatch):
    record_batches(monkeypatch, capacity=0)
    found = completions(HFBackend(spec(), batch_size=2), chats(3))
    assert all(completion.text is None and "out of memory" in completion.error for completion in found)


def test_other_errors_are_not_taken_for_want_of_memory(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(GenerationMixin, "generate", broken)
    with pytest.raises(RuntimeError, match="device-side"):
        completions(HFBackend(spec()), chats(1))


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("layers.", "blocks.")] = tensors.pop(name)


@pytest.mark.parametrize(("damage", "message"), [(lose_tensor, "1 tensor is missing"), (rename, "does not fit")])
def test_an_adapter_with_other_keys_is_refused(tmp_path, damage, message):
    """PEFT warns of missing ones, and says nothing of others."""
    folder = save_adapter(tmp_path, BASE)
    edit_weights(folder, damage)
    with pytest.raises(InputError, match=message):
        load_model(spec(adapter=folder))


def test_an_adapter_that_changes_nothing_is_none_the_less_one(tmp_path):
    folder = save_adapter(tmp_path, BASE)
    edit_weights(folder, lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "lora_B" in name])
    assert texts(HFBackend(spec(adapter=folder)), chats(3)) == texts(HFBackend(spec()), chats(3))


@pytest.mark.parametrize("what", ["base", "adapter", "tokenizer"])
def test_what_cannot_be_loaded_is_said(tmp_path, what):
    values: dict[str, Any] = {"base": str(BASE), "adapter": None, "tokenizer": str(BASE)}
    values[what] = str(tmp_path / "none")
    with pytest.raises(InputError, match="none"):
        list(HFBackend(ModelSpec("m", identity={}, **values)).complete(chats(1), GREEDY))


def test_without_a_chat_template_only_texts_are_answered(tmp_path):
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    backend = HFBackend(ModelSpec("m", str(BASE), None, str(tmp_path), {}))
    with pytest.raises(InputError, match="no chat template"):
        list(backend.complete(chats(1), GREEDY))
    assert completions(backend, ["<bos><user>how"])[0].text is not None


def test_attention_logits_are_capped(tmp_path):
    """transformers' default for Gemma 2 leaves the capping out."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.config.attn_logit_softcapping = 0.05
    model.save_pretrained(tmp_path)
    capped = load_model(spec(tmp_path))
    assert capped.config._attn_implementation == "eager"
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert (capped(ids.to(capped.device)).logits.cpu() - model(ids).logits).abs().max() > 0.1


def test_identity_is_of_the_model_and_not_of_the_batches():
    assert HFBackend(spec(), batch_size=1).identity() == HFBackend(spec(), batch_size=2).identity()
    assert HFBackend(spec()).identity() != HFBackend(ModelSpec("m", "a", None, "a", {"files": "other"})).identity()
    json.dumps(HFBackend(spec()).identity())
