"""WiSE-FT averages weights: at 0 the aligned model, at 1 the model as it is, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from adapters import edit_weights, save_adapter
from family import Family, run, tensors

from sails_align.core.errors import InputError
from sails_align.edits.weights import open_weights
from sails_align.models.spec import identity_of


def test_the_ends_are_the_two_models(family: Family, tmp_path: Path) -> None:
    for t, model in ((0.0, family.aligned), (1.0, family.tuned)):
        found = run("wise_ft", family.tuned, tmp_path / str(t), aligned_model=family.aligned, t=t)
        assert all(torch.equal(found[name], value) for name, value in tensors(model).items())


def test_between_them_every_tensor_is_the_average(family: Family, tmp_path: Path) -> None:
    found = run("wise_ft", family.tuned, tmp_path / "out", aligned_model=family.aligned, t=0.25)
    aligned, tuned = tensors(family.aligned), tensors(family.tuned)
    for name, value in found.items():
        expected = 0.75 * aligned[name].double() + 0.25 * tuned[name].double()
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)
    assert (found["model.norm.weight"] != aligned["model.norm.weight"]).any()


def test_an_adapter_on_the_aligned_model_is_scaled(family: Family, tmp_path: Path) -> None:
    before = tensors(family.tuned_adapter)
    found = run("wise_ft", family.tuned_adapter, tmp_path / "out", t=0.25)
    assert all(
        torch.equal(value, before[name] * 0.25 if "lora_B" in name else before[name]) for name, value in found.items()
    )


def test_an_adapter_on_another_model_becomes_a_model(family: Family, tmp_path: Path) -> None:
    found = run("wise_ft", family.tuned_adapter, tmp_path / "out", aligned_model=family.base, t=0.0)
    assert all(torch.equal(found[name], value) for name, value in tensors(family.base).items())


def test_a_continued_adapter_is_averaged_with_the_earlier_one(family: Family, tmp_path: Path) -> None:
    """At 0, the alignment that the earlier adapter holds is still there."""
    continued = save_adapter(tmp_path / "dpo", family.base)
    edit_weights(continued, lambda values: values.update({name: value * 1.5 for name, value in values.items()}))
    record = {
        "identity": {"adapter": identity_of(str(family.adapter))},
        "options": {"sails": {"adapter_path": str(family.adapter)}},
    }
    (continued / "run.json").write_text(json.dumps(record))
    found = run("wise_ft", continued, tmp_path / "out", t=0.0)
    earlier, base = open_weights(family.adapter), tensors(family.base)
    for name, value in found.items():
        torch.testing.assert_close(value, earlier.get(name), atol=1e-6, rtol=1e-6)
    assert any((found[name] - base[name]).abs().max() > 0.01 for name in found)


@pytest.mark.parametrize("t", [-0.1, 1.5, float("nan")])
def test_a_weight_beyond_the_ends_is_refused(family: Family, tmp_path: Path, t: float) -> None:
    with pytest.raises(InputError, match="t is"):
        run("wise_ft", family.tuned, tmp_path / "out", aligned_model=family.aligned, t=t)
