"""What can be known without vLLM."""

import importlib.util

import pytest
import torch
from adapters import edit_weights, save_adapter

from sails_align.core import machine
from sails_align.core.errors import InputError
from sails_align.evaluation.backends import vllm_options
from sails_align.evaluation.backends.vllm_backend import VLLMBackend, is_zero
from sails_align.evaluation.backends.vllm_options import engine_options
from sails_align.models.spec import ModelSpec
from sails_align.testbed.build import resolve_testbed

BASE = resolve_testbed("testbed").model_path


def half_zero(tensors: dict[str, torch.Tensor]) -> None:
    """As adapters begin: A of one module is zero, and B of the next."""
    for place, name in enumerate(sorted(name for name in tensors if "lora_A" in name)):
        tensors[name if place % 2 else name.replace("lora_A", "lora_B")].zero_()


def disjoint(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "lora_A" in name:
            tensors[name][:2] = 0
            tensors[name.replace("lora_A", "lora_B")][:, 2:] = 0


@pytest.mark.parametrize("change", [half_zero, disjoint])
def test_an_adapter_that_changes_nothing(tmp_path, change):
    folder = save_adapter(tmp_path, BASE)
    assert not is_zero(folder)
    edit_weights(folder, change)
    assert is_zero(folder)
    edit_weights(folder, lambda tensors: [tensor.fill_(1e-6) for tensor in list(tensors.values())[:2]])
    assert not is_zero(folder)


def test_the_type_is_the_checkpoints_own():
    """vLLM's own `auto` would make 16 bits of the testbed's 32."""
    assert engine_options(ModelSpec("m", BASE, None, BASE, {}))["dtype"] == "float32"
    assert engine_options(ModelSpec("m", BASE, None, BASE, {}, dtype="bfloat16"))["dtype"] == "bfloat16"
    with pytest.raises(InputError, match="cannot load the model /none"):
        engine_options(ModelSpec("m", "/none", None, "/none", {}))


def test_what_an_adapter_needs(tmp_path, monkeypatch):
    """vLLM is not needed: what would be given to it."""
    folder = save_adapter(tmp_path / "adapter", BASE, r=12)
    spec = ModelSpec("m", BASE, str(folder), str(folder), {}, revision="abc")
    monkeypatch.setattr(vllm_options, "_runs_on_cpu", lambda: True)
    assert engine_options(spec) == {
        "tokenizer": str(folder),
        "revision": "abc",
        "tokenizer_revision": None,  # the folder's, not that of the base on the hub
        "trust_remote_code": False,
        "dtype": "float32",
        "generation_config": "vllm",
        "enable_lora": True,
        "max_lora_rank": 16,
    }
    monkeypatch.setattr(vllm_options, "_runs_on_cpu", lambda: False)
    with pytest.raises(InputError, match="on GPUs vLLM computes adapters in 16 bits"):
        engine_options(spec)


def test_without_vllm_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        VLLMBackend(ModelSpec("m", BASE, None, BASE, {}))


@pytest.mark.parametrize(("version", "is_said"), [("0.32.0", False), ("0.33.0", True)])
def test_another_release_of_vllm_is_said(monkeypatch, caplog, version, is_said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    found = {"vllm": {"version": version, "wanted": "<0.33,>=0.32", "ok": not is_said}}
    monkeypatch.setattr(machine, "packages", lambda: ({}, found))
    VLLMBackend(ModelSpec("m", BASE, None, BASE, {"files": "abc"}))
    assert (f"vllm {version} is installed" in caplog.text) == is_said


def test_identity_is_of_what_decides_the_texts(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    spec = ModelSpec("m", BASE, None, BASE, {"files": "abc"})
    plain = VLLMBackend(spec).identity()
    assert plain == VLLMBackend(spec, chunk_size=8, tensor_parallel_size=2, enforce_eager=True).identity()
    assert plain != VLLMBackend(spec, max_model_len=64).identity()
    assert plain != VLLMBackend(ModelSpec("m", BASE, None, BASE, {"files": "abc"}, dtype="bfloat16")).identity()
