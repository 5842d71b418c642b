"""LoX adds the largest directions of the alignment once more, in a model and in an adapter."""

from pathlib import Path

import pytest
import torch
from family import Family, run, tensors, updates

from sails_align import edits
from sails_align.core.errors import InputError
from sails_align.edits.methods.lox import Lox
from sails_align.edits.options import LoxOptions


def extrapolated(aligned: torch.Tensor, base: torch.Tensor, k: int, alpha: float) -> torch.Tensor:
    """As the equation says, in float64."""
    u, s, v = torch.linalg.svd((aligned - base).double(), full_matrices=False)
    s[k or len(s) :] = 0
    return aligned.double() + alpha * (u * s @ v)


def test_the_worked_example() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))

    class FromZero:
        def of(self, name: str) -> torch.Tensor:
            return weight

    edit = Lox(FromZero(), LoxOptions(k=1, alpha=1.25))  # pyright: ignore
    found = edit.tensor("w", weight)
    torch.testing.assert_close(found, torch.diag(torch.tensor([6.75, 2.0, 1.0])), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("k", "alpha"), [(1, 1.25), (2, 0.5), (0, 2.0), (6, -0.5)])
def test_every_matrix_of_a_model(family: Family, tmp_path: Path, k: int, alpha: float) -> None:
    found = run("lox", family.aligned, tmp_path / "out", base_model=family.base, k=k, alpha=alpha)
    aligned, base = tensors(family.aligned), tensors(family.base)
    for name, new in found.items():
        if new.dim() == 1:
            assert torch.equal(new, aligned[name]), name
        else:
            expected = extrapolated(aligned[name], base[name], k, alpha)
            torch.testing.assert_close(new.double(), expected, atol=1e-6, rtol=1e-5)


def test_the_directions_of_the_weights_are_not_those_of_the_change() -> None:
    """A control: what is added lies in the change, and truncating W in its place adds something else."""
    generator = torch.Generator().manual_seed(0)
    base, left, right = (torch.randn(*shape, generator=generator) for shape in ((12, 9), (12, 3), (3, 9)))
    change = 0.1 * left @ right
    aligned = base + change

    class Change:
        def of(self, name: str) -> torch.Tensor:
            return change

    class Whole:
        def of(self, name: str) -> torch.Tensor:
            return aligned

    added, other = (
        Lox(of, LoxOptions(k=2, alpha=1.0)).tensor("w", aligned) - aligned  # pyright: ignore
        for of in (Change(), Whole())
    )

    def share_in_change(added: torch.Tensor) -> float:
        span = torch.linalg.qr(left)[0]
        return ((span @ (span.T @ added)).norm() / added.norm()).item()

    assert torch.linalg.matrix_rank(added, rtol=1e-4) == torch.linalg.matrix_rank(other, rtol=1e-4) == 2
    assert share_in_change(added) == pytest.approx(1.0, abs=1e-4)
    assert share_in_change(other) < 0.9
    assert (added - other).norm() > 0.5 * added.norm()


def test_limits_of_alpha(family: Family, tmp_path: Path) -> None:
    aligned, base = tensors(family.aligned), tensors(family.base)
    same = run("lox", family.aligned, tmp_path / "same", base_model=family.base, alpha=0.0)
    assert all(torch.equal(same[name], aligned[name]) for name in aligned)
    back = run("lox", family.aligned, tmp_path / "back", base_model=family.base, k=0, alpha=-1.0)
    for name in (name for name in base if base[name].dim() == 2):
        torch.testing.assert_close(back[name], base[name], atol=1e-6, rtol=0)


def test_an_adapter_stays_one_of_its_rank(family: Family, tmp_path: Path) -> None:
    run("lox", family.adapter, tmp_path / "out", k=2, alpha=1.25)
    before, after = updates(family.adapter), updates(tmp_path / "out")
    for name in before:
        zero = torch.zeros_like(before[name])
        torch.testing.assert_close(after[name], extrapolated(before[name], zero, 2, 1.25), atol=1e-5, rtol=1e-5)
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-5) == 2
        # Truncating the smallest directions instead would be another model.
        smallest = before[name] * 2.25 - 1.25 * (extrapolated(before[name], zero, 2, 1.0) - before[name])
        assert (smallest - after[name]).abs().max() > 0.01


def test_all_directions_of_an_adapter_scale_it(family: Family, tmp_path: Path) -> None:
    before = tensors(family.adapter)
    for k in (0, 4, 9):
        after = run("lox", family.adapter, tmp_path / str(k), k=k, alpha=0.5)
        for name, value in before.items():
            assert torch.equal(after[name], value * 1.5 if "lora_B" in name else value)


def test_fused_experts_are_left_alone_with_a_note(experts: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = experts
    before = tensors(aligned)
    done = edits.lox(model=aligned, output=tmp_path / "out", base_model=str(base), k=2)
    after = tensors(tmp_path / "out")
    stacks = [name for name, value in before.items() if value.dim() > 2]
    assert len(stacks) == 2
    assert all(torch.equal(after[name], before[name]) for name in stacks)
    assert any("2 changed tensors of more than 2 dimensions" in line for line in done.report())
    same = edits.lox(model=aligned, output=tmp_path / "same", base_model=str(aligned), k=2)
    assert not same.notes, "what training did not change is no loss"


def test_a_model_without_its_base_is_refused(family: Family, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--base_model"):
        run("lox", family.aligned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
