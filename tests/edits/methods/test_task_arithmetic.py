"""The safety vector is the difference of two models, whole or thinned."""

from pathlib import Path

import pytest
import torch
from family import Family, run, tensors

from sails_align.core.errors import InputError


def added(family: Family, folder: Path, **options: float) -> dict[str, torch.Tensor]:
    models = {"aligned_model": family.aligned, "unaligned_model": family.unaligned}
    return run("task_arithmetic", family.tuned, folder, **models, **options)


def test_the_vector_is_added_to_every_tensor(family: Family, tmp_path: Path) -> None:
    tuned, aligned, unaligned = (tensors(model) for model in (family.tuned, family.aligned, family.unaligned))
    for name, value in added(family, tmp_path / "out", alpha=0.5).items():
        expected = tuned[name].double() + 0.5 * (aligned[name].double() - unaligned[name].double())
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)


def test_alpha_0_changes_nothing(family: Family, tmp_path: Path) -> None:
    before = tensors(family.tuned)
    assert all(torch.equal(value, before[name]) for name, value in added(family, tmp_path / "out", alpha=0.0).items())


def test_minus_the_unaligned_models_own_change_gives_the_aligned_model(family: Family, tmp_path: Path) -> None:
    models = {"aligned_model": family.aligned, "unaligned_model": family.unaligned}
    found = run("task_arithmetic", family.unaligned, tmp_path / "out", **models, alpha=1.0)
    for name, value in tensors(family.aligned).items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)


def test_a_thinned_vector_keeps_its_mean(family: Family, tmp_path: Path) -> None:
    before = tensors(family.tuned)
    whole = added(family, tmp_path / "whole", alpha=1.0)
    thin = added(family, tmp_path / "thin", alpha=1.0, drop=0.75)
    again = added(family, tmp_path / "again", alpha=1.0, drop=0.75)
    other = added(family, tmp_path / "other", alpha=1.0, drop=0.75, drop_seed=1)
    n_kept = n = 0
    for name in before:
        moved, kept = whole[name] - before[name], (thin[name] - before[name]).abs() > 1e-7
        torch.testing.assert_close((thin[name] - before[name])[kept], 4 * moved[kept], atol=1e-5, rtol=1e-3)
        assert torch.equal(thin[name], again[name])
        n_kept, n = n_kept + int(kept.sum()), n + kept.numel()
    assert abs(n_kept / n - 0.25) < 0.01
    assert any((thin[name] != other[name]).any() for name in before)


@pytest.mark.parametrize("missing", ["aligned_model", "unaligned_model"])
def test_both_models_are_needed(family: Family, tmp_path: Path, missing: str) -> None:
    models = {"aligned_model": family.aligned, "unaligned_model": family.unaligned}
    del models[missing]
    with pytest.raises(InputError, match=f"--{missing}"):
        run("task_arithmetic", family.tuned, tmp_path / "out", **models)
