"""What training teaches to end with is what generation stops at, and is saved so."""

import json
from pathlib import Path

import pytest
from bigram import SPECIALS, bigram_tokenizer
from peft import AutoPeftModelForCausalLM
from tiny import Project
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sails_align.core.errors import InputError
from sails_align.data.tokens import turn_end
from sails_align.models.load import check_vocabulary, load_config, load_tokenizer
from sails_align.training import run as align
from sails_align.training.ends import agree_on_end

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}\n"
)
EOS, IM_END = SPECIALS.index("</s>"), SPECIALS.index("<|im_end|>")


@pytest.mark.parametrize("of_model", [EOS, [EOS], None])
def test_the_end_of_a_turn_becomes_the_eos(of_model: int | list[int] | None, caplog: pytest.LogCaptureFixture):
    tokenizer = bigram_tokenizer(CHATML)
    end = agree_on_end(tokenizer, GenerationConfig(eos_token_id=of_model))
    assert end.token == tokenizer.eos_token == "<|im_end|>"
    assert end.ids == ((IM_END,) if of_model is None else (IM_END, EOS))
    assert "generation stopped at </s> only" in caplog.text


@pytest.mark.parametrize("of_model", [IM_END, [EOS, IM_END]])
def test_an_end_that_generation_knows_changes_nothing(of_model: int | list[int], caplog: pytest.LogCaptureFixture):
    tokenizer = bigram_tokenizer(CHATML)
    end = agree_on_end(tokenizer, GenerationConfig(eos_token_id=of_model))
    assert (tokenizer.eos_token, set(end.ids), end.change) == ("</s>", {EOS, IM_END}, None)
    assert not caplog.records


def test_a_template_that_writes_no_end_is_made_to_write_the_eos(caplog: pytest.LogCaptureFixture):
    """The prompt, before and after, is the same to the character."""
    tokenizer, chat = bigram_tokenizer(BARE), [{"role": "user", "content": " Hi"}]
    before = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    end = agree_on_end(tokenizer, GenerationConfig(eos_token_id=EOS))
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == before
    answered = [*chat, {"role": "assistant", "content": " Yes"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"{before} Yes\n</s>"
    assert turn_end(tokenizer) == [EOS]
    assert end.change is not None
    assert "wrote no token" in caplog.text


def test_without_an_eos_a_template_must_write_an_end():
    tokenizer = bigram_tokenizer(BARE)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="names no EOS"):
        agree_on_end(tokenizer, None)
    tokenizer.chat_template = CHATML
    assert agree_on_end(tokenizer, None).token == "<|im_end|>"


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_the_end_is_saved(project: Project, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture):
    """Here <unk> ends turns; special tokens in the data stay text; a contradicting temperature does no harm."""
    model, template = tmp_path / "model", tmp_path / "t.jinja"
    for load in (AutoModelForCausalLM, AutoTokenizer):
        load.from_pretrained(project.folder / "tiny").save_pretrained(model)
    contradicting = {"eos_token_id": 2, "temperature": 0.6, "top_p": 0.9, "do_sample": False}
    (model / "generation_config.json").write_text(json.dumps(contradicting))
    template.write_text((model / "chat_template.jinja").read_text().replace("eos_token", "'<unk>'"))
    rows = [json.loads(line) for line in (project.folder / "safety.jsonl").read_text().splitlines()]
    rows = [{**row, "chosen": f"{row['chosen']} </s> and"} for row in rows]
    (tmp_path / "safety.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, start = tmp_path / "out", ["--init", "default"] if kind == "adapter" else ["--use_peft", "false"]
    options = {
        "model_name_or_path": model, "dataset_name": tmp_path / "safety.jsonl", "output_dir": out, "max_steps": 1,
        "eval_examples": 4, "chat_template_path": template, "disable_tqdm": "true", "per_device_train_batch_size": 2,
        "max_length": 32, "gradient_checkpointing": "false",
    }  # fmt: skip
    align.main("sft", [*(word for name, value in options.items() for word in (f"--{name}", str(value))), *start])
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == "<unk>"
    saved = GenerationConfig.from_pretrained(out)
    assert list(dict.fromkeys(saved.eos_token_id)) == [3, 2]  # older transformers write the first one twice
    assert saved.temperature is None
    record, card = json.loads((out / "run.json").read_text()), (out / "README.md").read_text()
    assert record["end"]["token"] == "<unk>"
    assert record["data"]["examples_with_special_tokens"] == record["data"]["train"]["rows"] > 0
    assert "A response ends with `<unk>`. Changed before the training" in card
    assert "hold special tokens" in caplog.text
    (AutoPeftModelForCausalLM if kind == "adapter" else AutoModelForCausalLM).from_pretrained(out)


@pytest.mark.parametrize("special", [True, False])
def test_a_tokenizer_with_tokens_that_have_no_embedding(project: Project, special: bool):
    tokenizer, config = load_tokenizer(str(project.folder / "tiny")), load_config(str(project.folder / "tiny"))
    check_vocabulary(tokenizer, config)
    tokenizer.add_tokens(["<|more|>"], special_tokens=special)
    if special:
        check_vocabulary(tokenizer, config)  # nothing writes it
        tokenizer.chat_template = f"{tokenizer.chat_template}<|more|>"
    with pytest.raises(InputError, match=r"'<\|more\|>' \(\d+\) has none"):
        check_vocabulary(tokenizer, config)


def test_named_templates(project: Project, tmp_path: Path):
    tokenizer = load_tokenizer(str(project.folder / "tiny"))
    own = tokenizer.chat_template
    for named in ({"default": own, "tool_use": "{{ 1 }}"}, {"rag": own}):
        tokenizer.chat_template = named
        tokenizer.save_pretrained(tmp_path / "named")
        assert load_tokenizer(str(tmp_path / "named")).chat_template == own
    tokenizer.chat_template = {"rag": own, "tool_use": own}
    with pytest.raises(InputError, match="has several chat templates \\(rag, tool_use\\)"):
        agree_on_end(tokenizer, None)
