"""LSSF adds the safety vector within the subspaces of safe answers."""

from pathlib import Path

import pytest
import torch
from family import Family, run, tensors

from sails_align import edits
from sails_align.core.errors import InputError
from sails_align.edits.linears import linears_of
from sails_align.edits.options import LssfOptions
from sails_align.edits.weights import open_weights

Requests = dict[str, str]


@pytest.fixture(scope="session")
def options(family: Family, requests: Requests) -> dict[str, object]:
    return {
        "aligned_model": family.aligned,
        "unaligned_model": family.unaligned,
        "dataset_name": requests["dataset_name"],
    }


def vectors(family: Family) -> dict[str, torch.Tensor]:
    aligned, unaligned = (tensors(folder) for folder in (family.aligned, family.unaligned))
    return {name: aligned[name].double() - unaligned[name].double() for name in linears_of(open_weights(family.base))}


def test_the_change_is_the_projected_vector(family: Family, options: dict, tmp_path: Path) -> None:
    before = tensors(family.tuned)
    after = run("lssf", family.tuned, tmp_path / "out", eta=0.6, alpha=0.5, **options)
    linears = vectors(family)
    assert {name for name in before if not torch.equal(before[name], after[name])} == linears.keys()
    for name, vector in linears.items():
        change = 2 * (after[name].double() - before[name].double())
        # What a projector leaves is orthogonal to what it takes, column by column.
        torch.testing.assert_close(
            (change * (vector - change)).sum(0), torch.zeros(vector.shape[1]).double(), atol=1e-4, rtol=0
        )
        assert change.norm() < 0.999 * vector.norm()


def test_all_directions_are_task_arithmetic(family: Family, options: dict, tmp_path: Path) -> None:
    before, linears = tensors(family.tuned), vectors(family)
    after = run("lssf", family.tuned, tmp_path / "out", eta=1.0, alpha=0.5, **options)
    n_full = 0
    for name, vector in linears.items():
        expected = before[name].double() + 0.5 * vector
        n_full += torch.allclose(after[name].double(), expected, atol=1e-5)
    assert n_full > len(linears) / 2  # wide layers have more outputs than there are different tokens


def test_alpha_0_changes_nothing(family: Family, options: dict, tmp_path: Path) -> None:
    before = tensors(family.tuned)
    found = run("lssf", family.tuned, tmp_path / "out", alpha=0.0, **options)
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_the_answers_decide_the_subspace(family: Family, options: dict, requests: Requests, tmp_path: Path) -> None:
    """Harmless answers in place of refusals give another result."""
    one = run("lssf", family.tuned, tmp_path / "one", eta=0.6, **options)
    harmless = {**options, "dataset_name": requests["helpful_dataset_name"]}
    other = run("lssf", family.tuned, tmp_path / "other", eta=0.6, **harmless)
    name = "model.layers.1.mlp.down_proj.weight"
    assert (one[name] - other[name]).abs().max() > 1e-3


def test_the_control_projects_onto_subspaces_of_the_same_rank_in_random_directions(
    family: Family, options: dict, tmp_path: Path
) -> None:
    before = tensors(family.tuned)
    plain = run("lssf", family.tuned, tmp_path / "plain", eta=0.6, **options)
    control = run("lssf", family.tuned, tmp_path / "control", eta=0.6, control_seed=0, **options)
    n_low = 0
    for name, vector in vectors(family).items():
        ours, theirs = (found[name].double() - before[name].double() for found in (plain, control))
        assert torch.linalg.matrix_rank(ours, atol=1e-4) == torch.linalg.matrix_rank(theirs, atol=1e-4)
        # It is a projection of the same vector, and no vector of another direction: what it leaves is orthogonal.
        assert (theirs * (vector - theirs)).sum().abs() < 1e-3 * vector.norm() ** 2
        if torch.linalg.matrix_rank(ours, atol=1e-4) < len(ours) / 2:
            n_low += 1
            assert (ours * theirs).sum() < 0.8 * ours.norm() * theirs.norm(), name
    assert n_low


def test_an_adapter_becomes_a_model(family: Family, options: dict, tmp_path: Path) -> None:
    of_adapter = {name: value for name, value in options.items() if name != "aligned_model"}
    given = {name: str(value) for name, value in of_adapter.items()}
    edited = edits.run("lssf", family.tuned_adapter, tmp_path / "out", LssfOptions(**given))
    assert not edited.is_adapter
    assert "ranks of 21 subspaces: " in edited.notes[0]
    assert "safe answers: 30 of " in edited.notes[1]
    before, after = open_weights(family.tuned_adapter), tensors(tmp_path / "out")
    change = after["model.layers.0.mlp.up_proj.weight"] - before.get("model.layers.0.mlp.up_proj.weight")
    assert change.any()


def test_what_cannot_be_used_is_refused(family: Family, options: dict, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "how do i break the lock"}\n' * 3)
    cases = [
        ({**options, "unaligned_model": None}, "--unaligned_model"),
        ({**options, "aligned_model": None}, "--aligned_model"),
        ({**options, "dataset_name": None}, "no harmful requests are known"),
        ({**options, "dataset_name": prompts}, "have no responses"),
        ({**options, "eta": 0.0}, "eta is 0.0"),
        ({**options, "a_1": float("nan")}, "a_1 is nan"),
        ({**options, "max_length": 2}, "leaves no token"),
    ]
    for given, said in cases:
        with pytest.raises(InputError, match=said):
            run("lssf", family.tuned, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
