"""What cached responses and verdicts are known by: the content of files, and every option that decides them."""

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sails_align.evaluation.backends.make import find_spec, make_backend
from sails_align.evaluation.judges.make import make_judges
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.options import ResponseArguments
from sails_align.evaluation.records import Prompt, Sampling
from sails_align.testbed.build import ASSETS

PROMPTS = [Prompt("1", ({"role": "user", "content": "Hello"},), "benign", "x")]
FILES = (
    *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "modeling_mine.py"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ASSETS / "model", tmp_path / "model")
    return tmp_path / "model"


def responses_of(folder: Path, **options: Any) -> dict[str, Any]:
    how = ResponseArguments(str(folder), **options)
    return make_backend(how, find_spec(how), PROMPTS).identity()


def verdicts_of(folder: Path) -> dict[str, Any]:
    who = JudgeArguments(["llm", "guard"], [str(folder)] * 2, guard_family="llama-guard-3")
    return {name: judge.identity("harm") for name, judge in make_judges(who, PROMPTS).items()}


@pytest.mark.parametrize("known", [responses_of, verdicts_of])
def test_each_file_of_a_model_counts_by_its_content(folder: Path, known: Callable[[Path], dict[str, Any]]) -> None:
    seen = [known(folder)]
    assert known(folder) == seen[0]
    for name in FILES:
        file = folder / name
        content = file.read_bytes() if file.is_file() else b""
        # JSON stays JSON, and safetensors keeps its header.
        changed = content[:-1] + bytes([content[-1] ^ 1]) if name == "model.safetensors" else content + b"\n"
        file.write_bytes(changed if content else b"{}")
        seen.append(known(folder))
        assert seen.count(seen[-1]) == 1, name


def test_a_chat_template_counts_by_its_content(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}")
    before = responses_of(folder, chat_template_path=str(template))
    template.write_text("{{ messages[-1].content }}")
    assert responses_of(folder, chat_template_path=str(template)) != before


def test_every_option_of_sampling_counts() -> None:
    """`respond` keys by all of them, and by the backend."""
    assert {option.name for option in fields(Sampling)} == {"max_new_tokens", "temperature", "seed", "schema"}
