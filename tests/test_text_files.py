"""Text files that users write may begin with a byte order mark, as some editors have it; it is not part of the text."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from sails_align.core.command_line import CommandLine
from sails_align.data.loading import load_rows
from sails_align.data.tokens import read_chat_template
from sails_align.evaluation.attacks.transfer import read_suffixes
from sails_align.models.load import load_tokenizer
from sails_align.testbed.build import ASSETS

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def with_bom(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    return path


def test_chat_templates(tmp_path: Path):
    assert read_chat_template(str(with_bom(tmp_path / "t.jinja", TEMPLATE))) == TEMPLATE
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ASSETS / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    with_bom(tmp_path / "model" / "chat_template.jinja", TEMPLATE)
    (tmp_path / "model" / "config.json").write_bytes((ASSETS / "model" / "config.json").read_bytes())
    assert load_tokenizer(str(tmp_path / "model")).chat_template == TEMPLATE


def test_configurations(tmp_path: Path):
    path = with_bom(tmp_path / "c.yaml", "learning_rate: 0.5\n")
    assert CommandLine.read(["--config", str(path)]).from_file == {"learning_rate": 0.5}


def test_suffixes(tmp_path: Path):
    assert read_suffixes(with_bom(tmp_path / "s.txt", "one\ntwo\n")) == ["one", "two"]
    assert read_suffixes(with_bom(tmp_path / "s.jsonl", json.dumps({"suffix": "one"}) + "\n")) == ["one"]


def test_data(tmp_path: Path):
    assert load_rows(str(with_bom(tmp_path / "d.jsonl", '{"a": "x"}\n'))).to_list() == [{"a": "x"}]
