"""The examples in the docstrings of the Python API are run, on the testbed's model; docs/api.md says what they use."""

import copy
import doctest
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import sails_align as sails
from sails_align.testbed.build import resolve_testbed
from sails_align.testbed.data import alignment_data

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the examples use and do not change."""
    if importlib.util.find_spec("deepspeed"):  # it prints a warning when it is imported, which is none of an example
        importlib.import_module("deepspeed")
    testbed = resolve_testbed(None)
    model = AutoModelForCausalLM.from_pretrained(testbed.model_path)
    tokenizer = AutoTokenizer.from_pretrained(testbed.model_path)
    pairs, harmless = (alignment_data(testbed.world, harmful=harmful, n=256) for harmful in (True, False))
    saes = sails.load_saes(testbed.sae_path, model=model)
    return {
        **{"sails": sails, "Path": Path, "LoraConfig": LoraConfig, "get_peft_model": get_peft_model},
        **{"testbed": testbed, "model": model, "tokenizer": tokenizer, "pairs": pairs, "harmless": harmless},
        **{"saes": saes, "subspace": sails.discover(model, tokenizer, saes, pairs, harmless, top_k=8, progress=False)},
        "result": sails.evaluate(model, tokenizer, "testbed", n_prompts=8, progress=False),
    }


@pytest.fixture
def names(found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the examples use, with a model of their own, in an empty folder but for an adapter."""
    monkeypatch.chdir(tmp_path)
    adapted = get_peft_model(copy.deepcopy(found["model"]), LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    init = sails.initialize(adapted, found["subspace"])
    adapted.save_pretrained("adapter")
    return {**found, "model": copy.deepcopy(found["model"]), "adapted": adapted, "init": init}


@pytest.mark.parametrize("name", sails.__all__)
def test_the_example_of_every_public_name_runs(name: str, names: dict[str, Any]) -> None:
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(sails, name), name, globs=names)
    assert found.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(found, out=said.append)
    assert not said, "".join(said)
