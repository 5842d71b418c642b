"""`--compare`: a model and its base, or another model, on the same prompts, with paired differences."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from peft import PeftModel
from stub_server import StubServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sails_align.cli.evaluate import helpfulness, safety
from sails_align.core.errors import InputError
from sails_align.evaluation.backends.hf import HFBackend
from sails_align.evaluation.evaluate import evaluate_model
from sails_align.models.resolve import resolve_model, without_adapter
from sails_align.subspace.basis import Subspace
from sails_align.testbed.build import resolve_testbed

N = "6"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the testbed's model; its random weights change every answer. The folder has a tokenizer, as a run's does."""
    base = Path(resolve_testbed(None).model_path)
    folder = save_adapter(tmp_path_factory.mktemp("adapter") / "run", base)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def argv(folder: Path, model: Any, *more: str) -> list[str]:
    options = ["--model", str(model), "--output_dir", str(folder), "--cache_path", str(folder.parent / "cache.sqlite")]
    return [*options, "--n_prompts", N, "--progress", "false", *more]


def comparison(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text())


def test_base_and_model_in_one_table(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = safety(argv(tmp_path / "run", adapter, "--compare", "base"))
    table = capsys.readouterr().out
    found = comparison(tmp_path / "run")
    assert found["compared"] == "base"
    # Each of the two is what it is when it is evaluated alone.
    base = json.loads((tmp_path / "run" / "compared" / "metrics.json").read_text())
    assert base["overall"] == safety(argv(tmp_path / "base", "testbed"))["overall"]
    assert metrics["overall"] == safety(argv(tmp_path / "model", adapter))["overall"]
    assert not (tmp_path / "model" / "comparison.json").exists()
    for name, row in found["overall"].items():
        assert row["model"] == metrics["overall"][name]
        assert row["compared"] == base["overall"][name]
        assert row["difference"]["value"] == pytest.approx(row["model"]["value"] - row["compared"]["value"])
    # The differences are those of the Python API.
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    plain = AutoModelForCausalLM.from_pretrained(resolve_testbed(None).model_path)
    quiet: Any = {"n_prompts": int(N), "progress": False}
    without = evaluate_model(plain, tokenizer, "testbed", **quiet)
    adapted: Any = PeftModel.from_pretrained(plain, str(adapter))
    differences = evaluate_model(adapted, tokenizer, "testbed", **quiet).compare(without).metrics
    assert {name: row["difference"] for name, row in found["overall"].items()} == {
        name: difference.to_json() for name, difference in differences.items()
    }
    right = found["overall"]["correct_answer_rate"]
    assert right["difference"]["value"] < -0.5, "this adapter destroys the model"
    assert right["difference"]["ci_high"] < 0
    words = table.split()
    assert {"base", "model", "difference"} <= set(words)
    assert f"{right['difference']['value'] * 100:+.1f}" in words
    assert "held-out categories" in " ".join(words)
    assert set(found["by_split"]) == {"harmful", "ood", "benign", "dual_use"}


def test_what_is_done_is_not_done_again(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is done when the command stops at its base; the same command asks for the rest only."""
    complete = HFBackend.complete

    def stop_at_base(self: Any, *args: Any) -> Any:
        assert self._spec.adapter is not None, "stopped"
        yield from complete(self, *args)

    monkeypatch.setattr(HFBackend, "complete", stop_at_base)
    with pytest.raises(AssertionError, match="stopped"):
        safety(argv(tmp_path / "run", adapter, "--compare", "base"))
    assert not (tmp_path / "run" / "comparison.json").exists()

    def stop_at_model(self: Any, *args: Any) -> Any:
        assert self._spec.adapter is None, "asked twice"
        yield from complete(self, *args)

    monkeypatch.setattr(HFBackend, "complete", stop_at_model)
    safety(argv(tmp_path / "run", adapter, "--compare", "base"))
    first = comparison(tmp_path / "run")
    monkeypatch.setattr(HFBackend, "complete", None)
    safety(argv(tmp_path / "run", adapter, "--compare", "base"))
    assert comparison(tmp_path / "run") == first


def test_another_model_and_helpfulness(adapter: Path, tmp_path: Path) -> None:
    helpfulness(argv(tmp_path / "run", "testbed", "--compare", str(adapter)))
    right = comparison(tmp_path / "run")["overall"]["correct_answer_rate"]
    assert right["difference"]["value"] > 0.5
    safety(argv(tmp_path / "run2", "testbed"))
    assert not (tmp_path / "run2" / "comparison.json").exists()


def test_a_comparison_does_not_outlive_its_evaluation(adapter: Path, tmp_path: Path) -> None:
    safety(argv(tmp_path / "run", adapter, "--compare", "base"))
    safety(argv(tmp_path / "run", adapter, "--overwrite_output_dir", "true"))
    assert not (tmp_path / "run" / "comparison.json").exists()


def test_base_of_a_steered_model_is_not_steered(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(resolve_testbed(None).model_path)
    seed = torch.Generator().manual_seed(0)
    basis_DR = torch.linalg.qr(torch.randn(model.config.hidden_size, 16, generator=seed))[0]
    Subspace({1: basis_DR}, {1: torch.ones(16)}, {}).save(tmp_path / "subspace", "hash")
    steered = ("--steer", "ablate", "--steer_subspace", str(tmp_path / "subspace"), "--compare", "base")
    safety(argv(tmp_path / "run", "testbed", *steered))
    plain = safety(argv(tmp_path / "plain", "testbed"))["overall"]
    found = comparison(tmp_path / "run")["overall"]
    assert {name: row["compared"] for name, row in found.items()} == plain
    assert found["correct_answer_rate"]["difference"]["value"] < 0


class AnyName(str):
    """The name of every model."""

    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False


def test_a_served_adapter_and_its_base(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "one", "kind": "benign"}\n{"prompt": "two", "kind": "benign"}\n'
    )
    numbers = count()
    with StubServer(lambda asked: f"Number {next(numbers)}.", model=AnyName()) as server:
        served = ["--backend", "openai", "--base_url", server.base_url, "--judge", "rules", "--compare", "base"]
        served += ["--prompts", str(tmp_path / "prompts.jsonl")]
        options = [word for word in argv(tmp_path / "run", "adapter") if word not in ("--n_prompts", N)]
        with pytest.raises(InputError, match="base_model is not given"):
            safety([*options, *served])
        safety([*options, *served, "--base_model", "plain"])
    assert {request.body["model"] for request in server.requests} == {"adapter", "plain"}
    assert comparison(tmp_path / "run")["overall"]["over_refusal_rate"]["difference"]["n"] == 2


@pytest.mark.parametrize(
    ("compare", "says"),
    [
        ("base", "has neither an adapter nor steering"),
        ("", "compare is empty"),
        ("no-such-folder/x", "no-such-folder/x"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_done(tmp_path: Path, compare: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        safety(argv(tmp_path / "run", "testbed", "--compare", compare))
    assert not list((tmp_path / "run").glob("*"))


def test_without_its_adapter_a_model_keeps_tokenizer_and_is_another_model(adapter: Path) -> None:
    spec = resolve_model(str(adapter))
    base = without_adapter(spec)
    assert base.adapter is None
    assert base.tokenizer == spec.tokenizer == str(adapter)
    assert base.identity != spec.identity
    assert "adapter_model.safetensors" not in json.dumps(dict(base.identity))
    assert "tokenizer.json" in base.identity["tokenizer"]
