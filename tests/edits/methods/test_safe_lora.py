"""Safe LoRA projects the updates that point away from the alignment, and leaves the others."""

from pathlib import Path

import pytest
import torch
from family import Family, run, tensors, updates

from sails_align.core.errors import InputError


def projection(family: Family, name: str) -> torch.Tensor:
    vector = tensors(family.aligned)[name].double() - tensors(family.base)[name].double()
    return vector @ vector.T / vector.norm()


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one * other).sum().item() / (one.norm() * other.norm()).item()


def test_updates_are_multiplied_by_the_projection(family: Family, tmp_path: Path) -> None:
    run("safe_lora", family.tuned_adapter, tmp_path / "out", unaligned_model=family.base, threshold=1.0)
    before, after = updates(family.tuned_adapter), updates(tmp_path / "out")
    for name, update in before.items():
        C = projection(family, f"{name.removeprefix('base_model.model.')}.weight")
        torch.testing.assert_close(after[name], C @ update, atol=1e-5, rtol=1e-4)
        assert (C @ C - C).abs().max() > 1e-3  # the paper's C is no projector


def test_only_updates_that_are_far_from_the_alignment(family: Family, tmp_path: Path) -> None:
    before = updates(family.tuned_adapter)
    cosines = {
        name: cosine(projection(family, f"{name.removeprefix('base_model.model.')}.weight") @ update, update)
        for name, update in before.items()
    }
    threshold = sorted(cosines.values())[len(cosines) // 2]
    run("safe_lora", family.tuned_adapter, tmp_path / "out", unaligned_model=family.base, threshold=threshold + 1e-4)
    after = updates(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, value in cosines.items() if value <= threshold + 1e-4}
    assert 0 < len(changed) < len(before)


def test_threshold_minus_1_changes_nothing(family: Family, tmp_path: Path) -> None:
    before = tensors(family.tuned_adapter)
    found = run("safe_lora", family.tuned_adapter, tmp_path / "out", unaligned_model=family.base, threshold=-1.0)
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_an_adapter_and_the_same_model_merged_are_edited_alike(family: Family, tmp_path: Path) -> None:
    from sails_align.edits.methods.merge import merge_adapter

    options = {"unaligned_model": family.base, "threshold": 1.0}
    merge_adapter(family.tuned_adapter, tmp_path / "merged")
    run("safe_lora", family.tuned_adapter, tmp_path / "adapter", **options)
    merge_adapter(tmp_path / "adapter", tmp_path / "expected")
    found = run("safe_lora", tmp_path / "merged", tmp_path / "found", aligned_model=family.aligned, **options)
    for name, value in tensors(tmp_path / "expected").items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_the_unaligned_model_is_needed(family: Family, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--unaligned_model"):
        run("safe_lora", family.tuned_adapter, tmp_path / "out")
