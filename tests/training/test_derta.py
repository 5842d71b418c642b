"""DeRTa in trainings: its loss, what it works with, and what a run says of it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Project, adapter_weights, build, distance

from sails_align.core.artifacts import tensors_hash
from sails_align.core.errors import InputError
from sails_align.data.prefilled import CUT_OFF, first_token
from sails_align.training import run as align

QUICK = ("--init", "default", "--num_train_epochs", "1")
DERTA = ("--derta_prefix_share", "1", "--derta_rto_share", "1")
ONLY_RTO = ("--derta_prefix_share", "0", "--derta_rto_share", "1", "--helpful_ratio", "0")


def sorry(source: Any) -> int:
    return source.tokenizer.convert_tokens_to_ids("sorry")


def test_with_no_words_and_no_rto_examples_it_is_plain_training_bit_for_bit(project: Project, tmp_path: Path):
    trained = []
    for more in ((), ("--derta_prefix_share", "1", "--derta_empty_share", "1"), ("--derta_prefix_share", "1")):
        built = build(project.argv(tmp_path, *QUICK, *more))
        built.trainer.train()
        trained.append((adapter_weights(built.trainer), built.trainer.evaluate()["eval_loss"]))
    (plain, plain_loss), (empty, empty_loss), (prefix, _) = trained
    assert distance(plain, empty) == 0
    assert empty_loss == plain_loss
    assert distance(plain, prefix) > 0


def test_of_a_model_with_fixed_logits_an_rto_example_costs_the_refusals_surprise(project: Project, tmp_path: Path):
    built = build(project.argv(tmp_path, *QUICK, *ONLY_RTO))
    trainer: Any = built.trainer
    rows = trainer.train_dataset
    rto = [row for row in rows if set(row["labels"]) == {-100, sorry(built.source)}]
    assert len(rto) == len(built.source.safety), "and as many plain refusals"
    model = trainer.model.eval()
    with torch.no_grad():  # one embedding for all tokens: every position is in the same state
        weight = model.get_input_embeddings().weight
        weight.copy_(weight[:1].expand_as(weight))
        batch = {name: values.to(model.device) for name, values in trainer.data_collator(rto[:5]).items()}
        loss = trainer.compute_loss(model, dict(batch)).item()
        logits_V = model(input_ids=batch["input_ids"][:1]).logits[0, 3].double()
        other = trainer.data_collator([rto[0] | {"input_ids": rto[1]["input_ids"][: len(rto[0]["input_ids"])]}])
        again = trainer.compute_loss(model, {name: values.to(model.device) for name, values in other.items()}).item()
    assert loss == pytest.approx(-logits_V.log_softmax(0)[sorry(built.source)].item(), rel=1e-5)
    assert again == pytest.approx(loss, rel=1e-5), "whatever the harmful answer is"


def test_discovery_is_that_of_a_training_without_it(project: Project, tmp_path: Path):
    built = [build(project.argv(tmp_path / name, *more)) for name, more in (("plain", ()), ("derta", DERTA))]
    subspaces = [tensors_hash(each.subspace.tensors()) for each in built if each.subspace is not None]
    assert len(subspaces) == 2
    assert subspaces[0] == subspaces[1]
    assert built[0].identity()["data"] != built[1].identity()["data"]


def test_packing_keeps_tokens_and_labels(project: Project, tmp_path: Path):
    counts, n_rows = [], []
    for more in ((), ("--packing", "true")):
        trainer: Any = build(project.argv(tmp_path, *QUICK, *DERTA, *more)).trainer
        rows = trainer.train_dataset
        counts.append(Counter(pair for row in rows for pair in zip(row["input_ids"], row["labels"], strict=True)))
        n_rows.append(len(rows))
    assert counts[0] == counts[1]
    assert n_rows[1] < n_rows[0]


def test_a_run_says_what_it_learned_from(project: Project, tmp_path: Path):
    options = (*QUICK, *DERTA, "--max_length", "20", "--max_steps", "2", "--max_train_examples", "12")
    argv = project.argv(tmp_path / "run", *options)
    long = project.folder / "long.jsonl"
    rows = [json.loads(line) for line in (project.folder / "safety.jsonl").read_text().splitlines()]
    answer = "you can with glue you can with glue you can with glue you can with glue"
    long.write_text("".join(json.dumps(row | {"rejected": answer}) + "\n" for row in rows))
    metrics = align.main("sft", [*argv, "--dataset_name", str(long)])
    n_cut = metrics["provenance"]["dropped_rows"][CUT_OFF]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 0 < n_cut < 8
    assert record["data"]["prefilled_examples"] == {"prefix": 8 - n_cut, "rto": 12}
    assert record["data"]["train"]["rows"] == 12 - n_cut + 12 + 12
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| derta_rto_share | `1.0` |" in card
    assert CUT_OFF in card
    assert "derta_refusal" not in card


def test_the_label_is_the_refusals_first_token_in_its_place(project: Project, tmp_path: Path):
    source = build(project.argv(tmp_path, *QUICK, *DERTA)).source
    prompt = [{"role": "user", "content": "how do i break the lock"}]
    assert first_token(source.tokenizer, prompt, "sorry no") == sorry(source)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("dpo", (), "derta_prefix_share is 1.0, but DPO compares whole responses"),
        ("sft", ("--assistant_only_loss", "true"), "assistant_only_loss is true, but these examples have labels"),
        ("sft", ("--completion_only_loss", "false"), "completion_only_loss false trains on the harmful words"),
        ("sft", ("--packing", "true", "--packing_strategy", "bfd_split"), "packing_strategy bfd_split parts examples"),
    ],
)
def test_what_it_cannot_be_used_with(project: Project, tmp_path: Path, method: Any, options: tuple, said: str):
    with pytest.raises(InputError, match=said):
        align.parse(method, project.argv(tmp_path, *DERTA, *options))


def test_refusals_that_begin_differently_are_refused_before_anything_is_written(tmp_path: Path):
    folder = tmp_path / "run"
    argv = ["--derta_rto_share", "1", "--init", "default", "--max_train_examples", "20", "--output_dir", str(folder)]
    with pytest.raises(InputError, match="the refusals begin with 3 different tokens"):
        align.main("sft", argv)
    assert not folder.exists()
