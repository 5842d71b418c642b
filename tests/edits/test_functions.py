"""Each edit is a function of the package, on the path of the command."""

import importlib
import inspect
import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from family import Family, tensors

from sails_align import edits
from sails_align.core.errors import InputError
from sails_align.edits.options import MODELS


@pytest.fixture
def quantized(family: Family, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(family.base, tmp_path / "quantized"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def options_of(name: str, family: Family, requests: dict[str, str]) -> dict[str, object]:
    """What each edit needs, and one option that is not its default."""
    aligned, base = str(family.aligned), str(family.base)
    unaligned = {"aligned_model": aligned, "unaligned_model": str(family.unaligned)}
    harmful = {"dataset_name": requests["dataset_name"]}
    options: dict[str, dict[str, object]] = {
        "merge": {"dtype": "bfloat16"},
        "lox": {"base_model": base, "k": 2},
        "wise_ft": {"aligned_model": aligned, "t": 0.25},
        "task_arithmetic": {**unaligned, "alpha": 0.25},
        "safe_lora": {"aligned_model": aligned, "unaligned_model": base, "threshold": 1.0},
        "rosi": {**requests, "rho": 0.05},
        "ablate": {**requests, "layer": 1},
        "lssf": {**unaligned, **harmful, "eta": 0.6},
        "irr": {**unaligned, **harmful, "recalibrate": "none"},
    }
    return options[name]


@pytest.mark.parametrize("name", edits.EDITS.names())
def test_an_edit_is_a_function(name: str, family: Family, requests: dict[str, str], tmp_path: Path) -> None:
    function, options = getattr(edits, name), options_of(name, family, requests)
    model = family.adapter if name == "merge" else family.tuned
    done = function(model=model, output=tmp_path / "function", device="cpu", **options)
    assert any(str(tmp_path / "function") in line for line in done.report())
    if name != "merge":
        record = json.loads((tmp_path / "function" / "edit.json").read_text())
        given = {option.name: getattr(done.options, option.name) for option in fields(done.options)}
        assert record["method"] == name
        assert record["model"] == str(model)
        assert record["options"] == {key: value for key, value in given.items() if key != "device"}
        assert options.items() <= record["options"].items()
    edits.run(name, model, tmp_path / "run", device="cpu", **options)
    found, expected = tensors(tmp_path / "function"), tensors(tmp_path / "run")
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    before = tensors(family.base if name == "merge" else model)
    assert any(not torch.equal(found[key].float(), value.float()) for key, value in before.items())


@pytest.mark.parametrize("name", edits.EDITS.names())
def test_its_signature_and_docstring_have_the_options(name: str) -> None:
    importlib.import_module(f"sails_align.edits.methods.{name}")
    function, entry = getattr(edits, name), edits.EDITS.get(name)
    assert inspect.isfunction(function), "not the module of that name"
    assert function.__name__ == name
    assert entry.options is not None
    options = {option.name: option for option in fields(entry.options)}
    parameters = inspect.signature(function).parameters
    assert list(parameters) == ["model", "output", *options]
    assert all(parameters[key].default == option.default for key, option in options.items())
    assert function.__doc__.startswith(entry.summary)
    assert all(f"{key}: {option.metadata['help']}" in function.__doc__ for key, option in options.items())


@pytest.mark.parametrize("name", [name for name in edits.EDITS.names() if name != "merge"])
def test_quantized_models_are_refused(
    name: str, family: Family, requests: dict[str, str], quantized: Path, tmp_path: Path
) -> None:
    """Whichever of an edit's models it is. (Merging has tests of its own.)"""
    options, said = (
        options_of(name, family, requests),
        f"{quantized} is quantized, and rounded weights cannot be edited",
    )
    for given in ("model", *MODELS):
        if given == "model" or given in options:
            models = {"model": family.tuned, **options, given: str(quantized)}
            with pytest.raises(InputError, match=rf"{said};\ngive the model before quantization"):
                getattr(edits, name)(output=tmp_path / "out", **models)
    with pytest.raises(InputError, match=said):
        getattr(edits, name)(model=family.adapter, output=tmp_path / "out", **{**options, "base_model": str(quantized)})
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_quantized_model_has_a_note(family: Family, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(family.adapter, tmp_path / "adapter"))
    for in_4bit in (True, False):
        (folder / "run.json").write_text(json.dumps({"options": {"model": {"load_in_4bit": in_4bit}}}))
        done = edits.lox(model=folder, output=tmp_path / f"out-{in_4bit}")
        assert any("trained on a quantized base model" in line for line in done.report()) is in_4bit


def test_an_unknown_option_is_refused(family: Family, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no option 'alhpa'; did you mean 'alpha'"):
        edits.lox(model=family.adapter, output=tmp_path / "out", alhpa=1.0)
