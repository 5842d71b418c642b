"""`sails preview`: what it shows is what the training trains on."""

import re
from pathlib import Path
from typing import Any

import pytest
from tiny import Project, build

from sails_align.cli import main
from sails_align.cli.preview import _method
from sails_align.core.command_line import CommandLine
from sails_align.subspace.options import Method
from sails_align.training.preview import CUT, TRAINED, PreviewedExample, preview, token_texts


def trained_on(argv: list[str], method: Method) -> list[tuple[list[int], list[bool]]]:
    """The sequences that the trainer of the same options gives the model, with what is trained on."""
    trainer = build(argv, method=method).trainer
    collate: Any = trainer.data_collator
    sequences = []
    for row in trainer.train_dataset:  # pyright: ignore
        batch = collate([row])
        trained = batch["labels"] != -100 if method == "sft" else batch["completion_mask"] == 1
        for ids, uses, mask in zip(batch["input_ids"], trained, batch["attention_mask"] == 1, strict=True):
            sequences.append((ids[mask].tolist(), uses[mask].tolist()))
    return sequences


def kept(example: PreviewedExample) -> tuple[list[int], list[bool]]:
    pieces = [piece for piece in example.pieces if piece.use != CUT]
    return [piece.token_id for piece in pieces], [piece.use == TRAINED for piece in pieces]


@pytest.mark.parametrize("more", [[], ["--max_length", "11"], ["--max_length", "9", "--truncation_mode", "keep_end"]])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_it_shows_what_is_trained_on(project: Project, tmp_path: Path, method: Method, more: list[str]) -> None:
    argv = (project.argv if method == "sft" else project.dpo_argv)(tmp_path, "--init", "default", *more)
    examples = preview(method, argv, 1000)
    shown = [kept(example) for example in examples if not example.left_out]
    assert shown == trained_on(argv, method)
    n_cut = [example.count(CUT) for example in examples]
    assert any(n_cut) == bool(more)
    for example in examples:
        said = [piece for piece in example.pieces if piece.role == "assistant"]
        assert said[-1].token_id == example.pieces[-2].token_id  # then comes EOS, which the template wrote
        assert example.pieces[-1].role == ""
        assert {piece.role for piece in example.pieces} == {"", "user", "assistant"}


def test_examples_with_labels_of_their_own(project: Project, tmp_path: Path) -> None:
    argv = project.argv(tmp_path, "--init", "default", "--derta_prefix_share", "1", "--derta_rto_share", "1")
    examples = preview("sft", argv, 1000)
    assert [kept(example) for example in examples] == trained_on(argv, "sft")
    taught = [example for example in examples if "each label is the first token of 'sorry no" in example.name]
    assert len(taught) == 36
    assert all("you can with glue" in "".join(piece.text for piece in example.pieces) for example in taught)
    texts = [{piece.text.strip() for piece in example.pieces} for example in examples]
    after = [example for example, words in zip(examples, texts, strict=True) if {"sorry", "you"} <= words]
    assert len(after) == 24
    for example in after:
        uses = {
            use: "".join(piece.text for piece in example.pieces if piece.use == use) for use in ("context", TRAINED)
        }
        assert " you" in uses["context"]
        assert uses[TRAINED].split()[0] == "sorry"


def test_what_is_printed(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = project.argv(tmp_path / "run", "--init", "default", "--max_length", "11")
    main(["preview", "--n_examples", "2", *argv])
    printed = capsys.readouterr().out
    assert re.search(r"^SFT of .*tiny: \d+ training examples$", printed, re.MULTILINE)
    assert len(re.findall(r"^example \d: \d+ tokens, \d+ of them trained on", printed, re.MULTILINE)) == 2
    assert re.search(r"^user +context +\d+ +\w", printed, re.MULTILINE)
    assert re.search(r"^assistant  trained +\d+  ", printed, re.MULTILINE)
    assert "\x1b" not in printed
    assert not (tmp_path / "run").exists()


def test_colours(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    preview("sft", project.argv(tmp_path, "--init", "default"), 1)
    assert re.search("\x1b\\[1;32m *\\w", capsys.readouterr().out)


def test_examples_that_are_left_out(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview("dpo", project.dpo_argv(tmp_path, "--init", "default", "--max_length", "2"), 1)
    assert "example 1, chosen: LEFT OUT, since its prompt alone fills max_length 2" in capsys.readouterr().out


def test_the_longest(project: Project, tmp_path: Path) -> None:
    argv = project.argv(tmp_path, "--init", "default")
    lengths = [sum(len(piece.text) for piece in example.pieces) for example in preview("sft", argv, 3, longest=True)]
    assert lengths == sorted(lengths, reverse=True)


def test_texts_of_tokens(shared: Path) -> None:
    from transformers import AutoTokenizer

    folder = shared / "models/stories260k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Once upon a time, 你好 \U0001f600 there was a bird. " * 4
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("argv", "method"),
    [
        ([], "sft"),
        (["--method", "dpo"], "dpo"),
        (["--beta", "0.2"], "dpo"),
        (["--packing", "true"], "sft"),
        (["--config", "dpo_sails.yaml"], "dpo"),
        (["--config", "sft_sails.yaml"], "sft"),
        (["--config", "mine.yaml", "--ref_model_name_or_path", "x"], "dpo"),
    ],
)
def test_the_method(argv: list[str], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dpo_sails.yaml", "sft_sails.yaml", "mine.yaml"):
        (tmp_path / name).write_text("seed: 1\n")
    assert _method(CommandLine.read(argv)) == method
