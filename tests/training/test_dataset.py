"""The data of a training: labels, named columns, and prompts that are in two places."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import TEMPLATE, Project

from sails_align.core.errors import InputError
from sails_align.training import run as align
from sails_align.training.dataset import TrainingSource
from sails_align.training.trainer import build_trainer

NO_SUBSPACE = ("--init", "default")


def source_of(project: Project, folder: Path, *more: str) -> TrainingSource:
    args, testbed = align.resolved(align.parse("sft", project.argv(folder / "run", *NO_SUBSPACE, *more)))
    return align.load_source(args, testbed)


def write(path: Path, rows: Sequence[Mapping]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(n: int = 40) -> list[dict]:
    return [
        {"prompt": f"how do i break {i // 2}", "response": "you can" if i % 2 else "sorry no", "is_safe": i % 2 == 0}
        for i in range(n)
    ]


def test_labelled_rows(project: Project, tmp_path: Path):
    path = write(tmp_path / "data.jsonl", labelled())
    source = source_of(project, tmp_path, "--dataset_name", path)
    assert set(source.safety["chosen"]) | set(source.held_out["chosen"]) == {"sorry no"}
    assert source.dropped == {"the response is labelled bad": 20}
    paired = source_of(project, tmp_path, "--dataset_name", path, "--bad_responses", "pair")
    assert set(paired.safety["rejected"]) == {"you can"}
    assert paired.dropped == {}
    assert (source.n_paired, paired.n_paired) == (0, 20)


def test_labels_are_on_the_card(project: Project, tmp_path: Path):
    path = write(tmp_path / "data.jsonl", labelled())
    align.main("sft", project.argv(tmp_path / "run", *NO_SUBSPACE, "--dataset_name", path, "--max_steps", "1"))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| `the response is labelled bad` | 20 |" in card
    assert "were paired" not in card
    rows = [*labelled(), {**labelled()[1], "prompt": "how do i bend it"}]
    path = write(tmp_path / "more.jsonl", [{**row, "is_safe": int(row["is_safe"]) - 1} for row in rows])  # 0 and -1
    named = ("--label_column", "is_safe", "--good_labels", "0", "--bad_responses", "pair")
    argv = project.argv(tmp_path / "dpo", *NO_SUBSPACE, "--dataset_name", path, *named, "--max_steps", "1")
    align.main("dpo", [*argv, "--helpful_ratio", "0"])
    card = (tmp_path / "dpo" / "README.md").read_text()
    assert "| `the response is labelled bad` | 1 |" in card
    assert "20 rows labelled bad were paired: their responses are the rejected ones." in card


def test_named_columns(project: Project, tmp_path: Path):
    rows = [{"q": row["prompt"], "a": row["response"], "fine": int(row["is_safe"])} for row in labelled()]
    safety = write(tmp_path / "data.jsonl", rows)
    helpful = write(tmp_path / "helpful.jsonl", [{"ask": f"how do i oil {i}", "say": "you can"} for i in range(40)])
    files = ("--dataset_name", safety, "--helpful_dataset_name", helpful)
    named = ("--prompt_column", "q", "--chosen_column", "a", "--label_column", "fine", "--good_labels", "1")
    also = ("--helpful_prompt_column", "ask", "--helpful_chosen_column", "say")
    source = source_of(project, tmp_path, *files, *named, *also)
    assert set(source.safety["chosen"]) == {"sorry no"}
    assert source.helpful is not None
    assert set(source.helpful["chosen"]) == {"you can"}
    with pytest.raises(InputError, match="--label_column fine"):
        source_of(project, tmp_path, *files, *named[:4], *also)


def test_no_prompt_is_trained_on_and_held_out(project: Project, tmp_path: Path):
    rows = [{"prompt": f"q {i % 10}", "chosen": f"no {i}", "rejected": f"yes {i}"} for i in range(40)]
    source = source_of(project, tmp_path, "--dataset_name", write(tmp_path / "data.jsonl", rows))
    assert not prompts(source.safety) & prompts(source.held_out)
    assert len(source.safety) + len(source.held_out) == 40

    write(tmp_path / "split" / "train.jsonl", rows)
    write(tmp_path / "split" / "test.jsonl", [*rows[:3], {**rows[0], "prompt": "another"}])
    helpful = write(
        tmp_path / "helpful.jsonl", [{"prompt": p, "response": "x"} for p in ["another", *"abcdefghij" * 4]]
    )
    files = ("--dataset_name", str(tmp_path / "split"), "--helpful_dataset_name", helpful)
    source = source_of(project, tmp_path, *files)
    assert prompts(source.held_out) == {"another"}
    assert len(source.safety) == 40
    assert source.dropped == {
        "held-out data: the prompt is in the training data too": 3,
        "helpful data: the prompt is in the held-out data too": 1,
    }


@pytest.mark.parametrize(("content", "said"), [("", "(split test) is empty"), ("x\n", "(split test) cannot be read")])
def test_a_test_split_that_cannot_be_read_is_not_taken_for_none(
    project: Project, tmp_path: Path, content: str, said: str
):
    write(tmp_path / "split" / "train.jsonl", labelled())
    (tmp_path / "split" / "test.jsonl").write_text(content)
    with pytest.raises(InputError) as error:
        source_of(project, tmp_path, "--dataset_name", str(tmp_path / "split"))
    assert said in str(error.value)


def prompts(dataset) -> set[str]:
    return {prompt[0]["content"] for prompt in dataset["prompt"]}


FAILURES = {
    "LookupError": "'{1}'.format(m.content)",
    "AttributeError": "1 | dictsort",
    "ArithmeticError": "1 // 0",
    "TypeError": "m.content + 1",
    "TemplateError": "raise_exception('not this one')",
}
"""Expressions of a chat template that raise them."""


def failing_on(word: str, expression: str, folder: Path) -> tuple[str, str]:
    """A template that fails with the messages that hold a word, as an option."""
    path = folder / "failing.jinja"
    failure = (
        f"{{% for m in messages %}}{{% if '{word}' in m.content %}}{{{{ {expression} }}}}{{% endif %}}{{% endfor %}}"
    )
    path.write_text(failure + TEMPLATE)
    return "--chat_template_path", str(path)


@pytest.mark.parametrize(
    ("expression", "place"), zip(FAILURES.values(), ["prompt", "chosen", "rejected"] * 2, strict=False)
)
def test_a_template_that_fails_with_one_row(project: Project, tmp_path: Path, expression: str, place: str):
    rows = [{"prompt": f"how do i break {i}", "chosen": f"no {i}", "rejected": f"yes {i}"} for i in range(40)]
    rows[17][place] += " strangeword"
    options = ("--dataset_name", write(tmp_path / "data.jsonl", rows), *failing_on("strangeword", expression, tmp_path))
    with pytest.raises(InputError) as error:
        source_of(project, tmp_path, *options)
    roles = "user" if place == "prompt" else "user, assistant"
    assert f"refuses a conversation of {roles}: " in str(error.value)
    assert "1 (row 17)\n" in str(error.value)
    assert "--on_bad_rows skip" in str(error.value)
    source = source_of(project, tmp_path, *options, "--on_bad_rows", "skip")
    assert len(source.safety) + len(source.held_out) == 39
    assert list(source.dropped.values()) == [1]


def test_a_template_that_fails_with_what_a_transform_made(project: Project, tmp_path: Path):
    """Its rows have no number: the cause and the remedy are said."""
    options = [*NO_SUBSPACE, *failing_on("strangeword", FAILURES["LookupError"], tmp_path)]
    args, testbed = align.resolved(align.parse("sft", project.argv(tmp_path / "run", *options)))
    source = align.load_source(args, testbed)
    changed = source.train.map(lambda row: {"chosen": row["chosen"] + " strangeword"})
    with pytest.raises(InputError, match=r"the chat template refuses an example of the data: .*;\nleave such rows out"):
        build_trainer(args, replace(source, train=changed), None)
