"""The Python API on the testbed's model: what a PEFT user does in a notebook, with nothing but objects in memory."""

import ast
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import sails_align as sails
from sails_align.data.pairs import to_sft
from sails_align.saes import sets
from sails_align.testbed.build import Testbed, resolve_testbed
from sails_align.testbed.data import alignment_data

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def testbed() -> Testbed:
    return resolve_testbed(None)


@pytest.fixture
def model(testbed: Testbed) -> Any:
    return AutoModelForCausalLM.from_pretrained(testbed.model_path)


@pytest.fixture(scope="module")
def tokenizer(testbed: Testbed) -> Any:
    return AutoTokenizer.from_pretrained(testbed.model_path)


@pytest.fixture(scope="module")
def pairs(testbed: Testbed) -> Dataset:
    return alignment_data(testbed.world, harmful=True, n=48)


@pytest.fixture(scope="module")
def harmless(testbed: Testbed) -> Dataset:
    return alignment_data(testbed.world, harmful=False, n=48)


@pytest.fixture(scope="module")
def found(testbed: Testbed, tokenizer: Any, pairs: Dataset, harmless: Dataset) -> sails.Subspace:
    whole = AutoModelForCausalLM.from_pretrained(testbed.model_path)
    saes = sails.load_saes(testbed.sae_path, model=whole)
    return sails.discover(whole, tokenizer, saes, pairs, harmless, top_k=8, **QUIET)


def test_the_whole_example(
    testbed: Testbed, model: Any, tokenizer: Any, pairs: Dataset, harmless: Dataset, tmp_path: Path, monkeypatch: Any
) -> None:
    from trl import SFTConfig, SFTTrainer

    monkeypatch.chdir(tmp_path)
    before = sails.evaluate(model, tokenizer, ["testbed"], n_prompts=4, **QUIET)
    saes = sails.load_saes(testbed.sae_path, layers=[1, 3], model=model)
    assert list(saes) == [1, 3]
    prompts = [row["prompt"][0]["content"] for row in harmless.to_list()]
    subspace = sails.discover(model, tokenizer, saes, pairs, harmless=prompts, top_k=8, **QUIET)
    assert not list(tmp_path.iterdir())  # no file is written
    features = subspace.features()
    assert set(features["layer"]) == {1, 3}
    assert len(features) == 2 * 2 * 8
    ids = torch.tensor([tokenizer(prompts[:4], padding=True)["input_ids"]][0])
    with torch.no_grad():
        logits = model(ids).logits
    model = get_peft_model(model, LoraConfig(r=16, target_modules=MODULES))
    init = sails.initialize(model, subspace, freeze="readers")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    args = SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=2, use_cpu=True, learning_rate=3e-3, report_to="none",
        save_strategy="no", disable_tqdm=True, per_device_train_batch_size=8,
    )  # fmt: skip
    drift = sails.DriftCallback(init)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=to_sft(pairs), processing_class=tokenizer, callbacks=[drift]
    )
    trainer.train()
    assert drift.measure(trainer.model)["adapter_update_norm"] > 0
    after = sails.evaluate(trainer.model, tokenizer, ["testbed"], n_prompts=4, **QUIET)
    assert len(after.to_pandas()) == 16
    assert after.compare(before).metrics["safety_rate"].n == 8
    assert sails.compare({"base": before, "tuned": after}, "base")["tuned"].metrics.keys()
    by_rules = sails.evaluate(trainer.model, tokenizer, before.prompts[:4], judge="rules", **QUIET)
    assert by_rules.rates().keys() >= {"refusal_rate"}
    assert "safety_rate" not in by_rules.rates()


def test_features_have_words_and_the_subspace_a_few_lines(found: sails.Subspace, tmp_path: Path) -> None:
    features = found.features()
    assert list(features.columns) == ["layer", "used_by", "id", "score", "promoted", "link"]
    assert set(features["used_by"]) == {"readers", "writers"}
    assert all(len(words) == 6 and all(isinstance(word, str) for word in words) for words in features["promoted"])
    assert features["link"].isna().all()  # the testbed's SAEs are not public
    assert len(repr(found).splitlines()) == 1 + len(found.bases)
    assert "layer 1: " in repr(found)
    found.save(tmp_path)
    assert sails.Subspace.load(tmp_path).features().equals(features)


def test_a_template_that_fails_with_one_row(testbed: Testbed, model: Any, tokenizer: Any, pairs: Dataset) -> None:
    saes = sails.load_saes(testbed.sae_path, layers=[2], model=model)
    failing = copy.deepcopy(tokenizer)
    failure = "{% for m in messages %}{% if 'strange' in m.content %}{{ 1 // 0 }}{% endif %}{% endfor %}"
    failing.chat_template = failure + tokenizer.chat_template
    rows = pairs.to_list()
    rows[3]["rejected"] += " strange"
    with pytest.raises(sails.InputError, match=r"refuses a conversation of user, assistant: .*1 \(row 3\)"):
        sails.discover(model, failing, saes, rows, contrast="response", top_k=4, **QUIET)
    found = sails.discover(model, failing, saes, rows, contrast="response", top_k=4, on_bad_rows="skip", **QUIET)
    assert list(found.bases) == [2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(
    testbed: Testbed, tokenizer: Any, pairs: Dataset, harmless: Dataset, found: sails.Subspace, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(testbed.model_path, dtype=dtype).train()
    saes = sails.load_saes(testbed.sae_path, model=model)
    half = sails.discover(model, tokenizer, saes, pairs, harmless, top_k=8, **QUIET)
    assert model.training
    for layer, basis_DR in found.bases.items():
        shared = (half.bases[layer].T @ basis_DR).square().sum() / basis_DR.shape[1]
        assert shared > 0.7, layer
    model = get_peft_model(model, LoraConfig(r=8, target_modules=MODULES))
    sails.initialize(model, half)


def test_what_harmless_requests_may_be(
    testbed: Testbed, model: Any, tokenizer: Any, pairs: Dataset, tmp_path: Path
) -> None:
    saes = sails.load_saes(testbed.sae_path, layers=[2], model=model)
    rows = alignment_data(testbed.world, harmful=False, n=16).to_list()
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"prompt": row["prompt"][0]["content"]}) + "\n" for row in rows)
    )
    forms: list[Any] = [
        [row["prompt"] for row in rows],
        [{"prompt": row["prompt"]} for row in rows],
        Dataset.from_list([{"instruction": row["prompt"][0]["content"]} for row in rows]),
        sails.load_prompts(str(tmp_path / "mine.jsonl"), kind="benign"),
    ]
    options: dict[str, Any] = {"top_k": 4, "contrast": "prompt", **QUIET}
    texts = [row["prompt"][0]["content"] for row in rows]
    expected = sails.discover(model, tokenizer, saes, pairs.to_list(), texts, **options)
    for form in forms:
        other = sails.discover(model, tokenizer, saes, pairs.to_list(), form, **options)
        torch.testing.assert_close(other.bases[2], expected.bases[2])


def test_a_cached_subspace_is_found_again_by_the_weights(
    testbed: Testbed, model: Any, tokenizer: Any, pairs: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saes = sails.load_saes(testbed.sae_path, layers=[2], model=model)
    first, again = (sails.discover(model, tokenizer, saes, pairs, cache_dir=tmp_path, **QUIET) for _ in range(2))
    assert "discovery is skipped" in capsys.readouterr().err
    assert again.features().equals(first.features())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.1)
    sails.discover(model, tokenizer, saes, pairs, cache_dir=tmp_path, **QUIET)
    assert "discovery is skipped" not in capsys.readouterr().err


def test_baselines_need_no_saes(model: Any, tokenizer: Any, pairs: Dataset, harmless: Dataset) -> None:
    subspace = sails.discover(model, tokenizer, None, pairs, harmless, init="mean_diff", **QUIET)
    with pytest.raises(sails.InputError, match="uses no SAE features"):
        subspace.features()
    with pytest.raises(sails.InputError, match="needs SAEs"):
        sails.discover(model, tokenizer, None, pairs, harmless, **QUIET)
    with pytest.raises(sails.InputError, match="did you mean 'top_k'"):
        sails.discover(model, tokenizer, None, pairs, harmless, topk=8)


def test_only_adapters_that_are_zero_are_initialized(model: Any, found: sails.Subspace) -> None:
    with pytest.raises(sails.InputError, match="has no adapter"):
        sails.initialize(model, found)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=MODULES))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.1)
    kept = layer.lora_A["default"].weight.clone()
    with pytest.raises(sails.InputError, match="is not zero"):
        sails.initialize(model, found)
    assert torch.equal(layer.lora_A["default"].weight, kept)
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    assert "adapter 'default'" in repr(sails.initialize(model, found, freeze=True))
    assert not layer.lora_A["default"].weight.requires_grad


def test_saes_that_there_are_not(testbed: Testbed, model: Any) -> None:
    with pytest.raises(sails.InputError, match="has no SAE of layer 0; it has"):
        sails.load_saes(testbed.sae_path, layers=[0, 1], model=model)
    with pytest.raises(sails.InputError, match="gemma-scope-2b-pt-res-canonical"):
        sails.load_saes("gemma-scope-2b-pt-res-canonicl", layers=[5], model=model)
    with pytest.raises(sails.InputError, match="repository on the hub, give the ids of its SAEs"):
        sails.load_saes("someone/saes", layers=[5], model=model)


def test_each_sae_is_read_once(testbed: Testbed, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load_sae, read = sets.load_sae, []

    def counted(source: Any, name: str, **options: Any) -> Any:
        read.append(name)
        return load_sae(source, name, **options)

    monkeypatch.setattr(sets, "load_sae", counted)
    saes = sails.load_saes(testbed.sae_path, layers=[1, 3], model=model)
    assert list(saes) == [1, 3]
    assert saes[3].info.layer == 3
    assert sorted(Path(name).name for name in read) == ["layer_1", "layer_2", "layer_3"]


@pytest.mark.parametrize(
    ("release", "layer", "expected"),
    [
        ("gemma-scope-2b-pt-res-canonical", 5, "layer_5/width_16k/canonical"),
        ("gemma-scope-9b-pt-res-canonical", 20, "layer_20/width_16k/canonical"),
        ("llama_scope_lxr_8x", 12, "l12r_8x"),
        ("gemma-scope-2b-pt-res", 5, "has several SAEs of layer 5"),
        ("llama_scope_lxr_8x", 99, "has no SAE of layer 99"),
    ],
)
def test_the_saes_of_a_release_by_layer(release: str, layer: int, expected: str) -> None:
    from sails_align.saes.files import ids_of_layers

    if expected.startswith("has "):
        with pytest.raises(sails.InputError, match=expected):
            ids_of_layers(release, [layer])
    else:
        assert ids_of_layers(release, [layer]) == [expected]


def test_all_public_names_exist_and_are_those_that_type_checkers_see() -> None:
    assert sorted(sails.__all__) == sails.__all__ == sorted(sails._PUBLIC)
    assert all(getattr(sails, name).__doc__ for name in sails.__all__)
    assert set(sails.__all__) <= set(dir(sails))
    tree = ast.parse(Path(sails.__file__).read_text())
    for_types = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        name.asname or name.name: f"{node.module}:{name.name}"
        for node in for_types.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert imported == {name: f"sails_align.{target}" for name, target in sails._PUBLIC.items()}
    with pytest.raises(AttributeError, match="no attribute 'discovr'"):
        sails.discovr  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_all_public_names_are_in_the_reference() -> None:
    pages = (Path(__file__).parents[1] / "docs" / "api").glob("*.md")
    shown = {line for page in pages for line in page.read_text().splitlines() if line.startswith(":::")}
    for name, target in sails._PUBLIC.items():
        module, _, attribute = target.partition(":")
        assert f"::: sails_align.{module}" in shown, f"{name} is on no page of docs/api"
        assert not attribute.startswith("_")  # which the reference leaves out


def test_importing_it_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys, time; start = time.process_time(); import sails_align; taken = time.process_time() - start; "
        "assert not {'torch', 'transformers', 'datasets', 'pandas'} & sys.modules.keys(); print(taken)"
    )
    taken = min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))
    assert taken < 0.3
