"""How far a model is from its base, token by token."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from peft import PeftModel

from sails_align.cli.evaluate import divergence
from sails_align.core.errors import InputError
from sails_align.data.messages import user
from sails_align.data.tokens import tokenize_response
from sails_align.evaluation.divergence import divergences
from sails_align.models.load import load_causal_lm, load_tokenizer
from sails_align.testbed.build import ASSETS

BASE = ASSETS / "model"


def run(folder: Path, *options: str) -> Any:
    files = ["--output_dir", str(folder / "out"), "--cache_path", str(folder / "cache.sqlite"), "--progress", "false"]
    return divergence([*files, "--n_prompts", "6", *options])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", BASE)


def test_the_numbers_are_those_of_the_definition(adapter: Path) -> None:
    """By hand, one sequence at a time, without padding."""
    tokenizer, base = load_tokenizer(BASE), load_causal_lm(BASE, dtype=torch.float32).eval()
    adapted: Any = PeftModel.from_pretrained(load_causal_lm(BASE, dtype=torch.float32), str(adapter)).eval()
    sides = [tokenize_response(tokenizer, [user("what is a dopen?")], text, 99) for text in ("a dopen is", "no")]
    found = divergences(adapted, base, [sides[0], None, sides[1]])
    assert found[1] is None
    assert found[0] is not None
    for side, of in zip(sides, (found[0], found[2]), strict=True):
        assert of is not None
        ids = torch.tensor([side.input_ids])
        with torch.no_grad():
            log_p, log_q = (model(ids).logits[0].log_softmax(-1) for model in (adapted, base))
        at = [place for place, is_content in enumerate(side.mask) if is_content]
        assert of.n_tokens == len(at)
        kl = sum(float((log_q[t - 1].exp() * (log_q[t - 1] - log_p[t - 1])).sum()) for t in at) / len(at)
        assert of.kl_per_token == pytest.approx(kl, rel=1e-4)
        assert kl > 0.01
        for log, loss in ((log_p, of.answer_loss), (log_q, of.base_answer_loss)):
            assert loss == pytest.approx(-sum(float(log[t - 1, ids[0, t]]) for t in at) / len(at), rel=1e-4)
    (without,) = divergences(adapted, None, [sides[0]])
    assert without is not None
    assert without.kl_per_token == pytest.approx(found[0].kl_per_token, rel=1e-4), "None: without the adapter"


def test_a_model_and_its_base_on_the_base_models_answers(adapter: Path, tmp_path: Path) -> None:
    metrics = run(tmp_path, "--model", str(adapter))
    assert metrics["overall"]["kl_per_token"]["value"] > 0.01
    assert metrics["overall"]["kl_per_token"]["n"] == 12, "harmful prompts are left out"
    assert metrics["overall"]["answer_loss"]["value"] > metrics["overall"]["base_answer_loss"]["value"]
    assert set(metrics["by_split"]) == {"benign", "dual_use"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "tokens.jsonl").read_text().splitlines()]
    assert sum(row["n_tokens"] for row in rows) == metrics["n_tokens"]
    assert run(tmp_path, "--model", str(adapter)) == metrics, "with the same options again"
    with pytest.raises(InputError, match=r"holds other results \(different: prompts, n_prompts \(6, now 5\)"):
        run(tmp_path, "--model", str(adapter), "--n_prompts", "5")


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    metrics = run(tmp_path, "--base", "testbed", "--reference", "set")
    assert metrics["overall"]["kl_per_token"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["overall"]["answer_loss"]["value"] == metrics["overall"]["base_answer_loss"]["value"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "testbed has no adapter; give --base, the model that it was trained from"),
        (("--base", ""), "base is empty; give a model"),
        (("--backend", "openai", "--base_url", "http://127.0.0.1:9/v1"), "backend is openai, which does not give"),
    ],
)
def test_what_cannot_be_compared_is_refused(options: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        run(tmp_path, *options)
