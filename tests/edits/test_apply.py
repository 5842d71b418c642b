"""What every edit does: a card, a record, a report of the change, controls, and refusals that lose nothing."""

from pathlib import Path

import pytest
import torch
from family import Family, run, tensors

from sails_align import edits
from sails_align.cli import edit as command
from sails_align.core.errors import InputError


def test_the_command_writes_a_card_and_a_record(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["lox", str(family.aligned), "--output", str(tmp_path / "out"), "--base_model", str(family.base), "--k", "2"]
    command.main(argv)
    told = capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "sails edit lox" in card
    assert "- `k`: `2`\n- `alpha`: `1.25`\n" in card
    assert f"- `base_model`: `{family.base.name}`\n" in card
    assert "tensors" in card
    assert str(family.base.parent) not in card
    assert "tensors changed" in told
    assert "logits    differ" in told
    command.main(argv)
    assert "nothing is done" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"different: k \(2, now 3\)"):
        command.main([*argv[:-1], "3"])


def test_the_report_is_of_what_was_changed(family: Family, tmp_path: Path) -> None:
    done = edits.run("wise_ft", family.tuned, tmp_path / "out", aligned_model=str(family.aligned), t=0.5)
    before, after = tensors(family.tuned), tensors(tmp_path / "out")
    changed = sum((after[name] - before[name]).double().square().sum() for name in before)
    whole = sum(value.double().square().sum() for value in before.values())
    assert done.share == pytest.approx(float(changed / whole) ** 0.5, rel=1e-4)
    assert done.n_changed == done.n_tensors == len(before)
    assert done.difference > 0
    same = edits.run("wise_ft", family.tuned, tmp_path / "same", aligned_model=str(family.aligned), t=1.0)
    assert (same.n_changed, same.share, same.difference) == (0, 0.0, 0.0)


def test_a_control_keeps_the_size_and_the_singular_values_but_not_the_directions(
    family: Family, tmp_path: Path
) -> None:
    options = {"base_model": family.base, "k": 3, "alpha": 1.0}
    plain = run("lox", family.aligned, tmp_path / "plain", **options)
    control = run("lox", family.aligned, tmp_path / "control", control_seed=0, **options)
    other = run("lox", family.aligned, tmp_path / "other", control_seed=1, **options)
    aligned = tensors(family.aligned)
    name = "model.layers.1.mlp.down_proj.weight"
    ours, theirs = (weights[name].double() - aligned[name].double() for weights in (plain, control))
    torch.testing.assert_close(torch.linalg.svdvals(ours), torch.linalg.svdvals(theirs), atol=1e-5, rtol=1e-4)
    assert (ours * theirs).sum().abs() < 0.5 * ours.square().sum()
    assert (other[name] != control[name]).any()
    adapter = run("lox", family.adapter, tmp_path / "adapter", control_seed=0, k=1)
    assert adapter.keys() == tensors(family.adapter).keys()


def test_unknown_options_and_used_folders_are_refused(family: Family, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no option 'alhpa'; did you mean 'alpha'"):
        edits.run("lox", family.adapter, tmp_path / "out", alhpa=1.0)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        edits.run("lox", family.adapter, tmp_path / "used")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="device is 'cuda:9'"):
        edits.run("lox", family.adapter, tmp_path / "out", device="cuda:9")
    assert not (tmp_path / "out").exists()
