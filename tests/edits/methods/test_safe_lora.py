"""Safe LoRA projects the updates that point away from the alignment, and leaves the others."""

import shutil
from pathlib import Path

import pytest
import torch
from family import Family, run, tensors, updates
from safetensors.torch import save_file

from sails_align import edits
from sails_align.core.errors import InputError
from sails_align.edits.controls import Turn


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


def test_the_control_projects_the_same_updates_onto_random_directions(family: Family, tmp_path: Path) -> None:
    options = {"unaligned_model": family.base, "threshold": 0.3}
    plain = run("safe_lora", family.tuned_adapter, tmp_path / "plain", **options)
    control = run("safe_lora", family.tuned_adapter, tmp_path / "control", control_seed=0, **options)
    assert plain.keys() == control.keys()
    folders = (family.tuned_adapter, tmp_path / "plain", tmp_path / "control")
    before, ours, theirs = (updates(folder) for folder in folders)
    projected = {name for name in before if not torch.equal(ours[name], before[name])}
    assert projected
    assert projected == {name for name in before if not torch.equal(theirs[name], before[name])}
    for name in projected:
        tensor = f"{name.removeprefix('base_model.model.')}.weight"
        C, turn = projection(family, tensor), Turn.draw(len(before[name]), tensor, 0)
        turned = turn.back(turn.back(C).T)  # P^T C P
        torch.testing.assert_close(torch.linalg.eigvalsh(turned), torch.linalg.eigvalsh(C))
        torch.testing.assert_close(theirs[name], turned @ before[name], atol=1e-5, rtol=1e-4)
        assert (theirs[name] - ours[name]).norm() > 0.1 * ours[name].norm()  # another choice
        assert theirs[name].norm() < before[name].norm()  # which shrinks the update, too: nothing is added


def test_it_says_how_many_are_projected_and_how_many_have_no_direction(family: Family, tmp_path: Path) -> None:
    """An alignment that changed only some matrices: here the first block's."""
    unaligned = Path(shutil.copytree(family.aligned, tmp_path / "unaligned"))
    weights, base = tensors(unaligned), tensors(family.base)
    weights.update({name: value for name, value in base.items() if "layers.0." in name})
    save_file(weights, unaligned / "model.safetensors", metadata={"format": "pt"})
    for model, n, n_with, more in (
        (family.tuned_adapter, 12, 4, {}),
        (family.tuned, 23, 7, {"aligned_model": str(family.aligned)}),
    ):
        output = tmp_path / f"of-{model.name}"
        done = edits.safe_lora(model=model, output=output, unaligned_model=str(unaligned), threshold=1.0, **more)
        assert done.notes[0] == f"{n_with} of {n} updated matrices are projected"
        assert done.notes[1].startswith(f"{n - n_with} of {n} updated matrices have no safety direction")
        assert done.n_changed == n_with
    none = edits.safe_lora(
        model=family.tuned_adapter, output=tmp_path / "none", unaligned_model=str(family.base), threshold=-1.0
    )
    assert none.notes == ("0 of 12 updated matrices are projected",)


def test_fused_experts_are_left_alone_with_a_note(experts: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = experts
    options = {"aligned_model": str(base), "unaligned_model": str(tuned), "threshold": 1.0}
    done = edits.safe_lora(model=tuned, output=tmp_path / "out", **options)
    before, after = tensors(tuned), tensors(tmp_path / "out")
    assert all(torch.equal(after[name], value) for name, value in before.items() if value.dim() > 2)
    assert any("2 changed tensors of more than 2 dimensions" in line for line in done.report())


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
