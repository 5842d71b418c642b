"""IRR removes the changes that work against the safety vector, layer by layer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family import Family, run, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sails_align.cli.edit import main
from sails_align.core.errors import InputError
from sails_align.data.tokens import tokenize_response
from sails_align.edits.linears import linears_of
from sails_align.edits.options import IrrOptions
from sails_align.edits.recalibration import thin
from sails_align.edits.weights import open_weights
from sails_align.models.inputs import watched_inputs

PATHS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


@pytest.fixture(scope="session")
def options(family: Family, requests: dict[str, str]) -> dict[str, Any]:
    named = {"dataset_name": requests["dataset_name"], "task_dataset_name": requests["helpful_dataset_name"]}
    return {"aligned_model": family.aligned, "unaligned_model": family.unaligned, **named}


def parts(family: Family) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The aligned weight, the change and the safety vector of each linear layer."""
    aligned, tuned, unaligned = (tensors(folder) for folder in (family.aligned, family.tuned, family.unaligned))
    names = linears_of(open_weights(family.base))
    return {name: (aligned[name], tuned[name] - aligned[name], aligned[name] - unaligned[name]) for name in names}


def test_without_recalibration_what_works_against_safety_is_gone(
    family: Family, options: dict[str, Any], tmp_path: Path
) -> None:
    no_data = {name: value for name, value in options.items() if "dataset" not in name}
    found, before = run("irr", family.tuned, tmp_path / "out", recalibrate="none", **no_data), tensors(family.tuned)
    linears = parts(family)
    for name, (aligned, delta, vector) in linears.items():
        expected = aligned + delta * (delta.sign() == vector.sign())
        torch.testing.assert_close(found[name], expected, atol=1e-7, rtol=1e-6)
    assert all(torch.equal(found[name], before[name]) for name in before.keys() - linears.keys())


def test_the_control_removes_as_many_entries_in_other_places(
    family: Family, options: dict[str, Any], tmp_path: Path
) -> None:
    no_data = {name: value for name, value in options.items() if "dataset" not in name}
    plain, control = (
        run("irr", family.tuned, tmp_path / str(seed), recalibrate="none", control_seed=seed, **no_data)
        for seed in (None, 0)
    )
    for name, (aligned, delta, _) in parts(family).items():
        ours, theirs = (found[name] - aligned for found in (plain, control))
        assert abs(int((ours == 0).sum()) - int((theirs == 0).sum())) <= 0.01 * delta.numel() + (delta == 0).sum()
        kept = theirs != 0
        torch.testing.assert_close(theirs[kept], delta[kept], atol=1e-6, rtol=1e-5)  # nothing is added
        assert ((ours == 0) != (theirs == 0)).sum() > 0.1 * delta.numel()


@pytest.mark.parametrize("recalibrate", ["official", "exact", "none"])
def test_ends(family: Family, options: dict[str, Any], tmp_path: Path, recalibrate: str) -> None:
    rule = {"recalibrate": recalibrate}
    before = tensors(family.tuned)
    same = run("irr", family.tuned, tmp_path / "same", sparsity=1.0, **options, **rule)
    assert all(torch.equal(same[name], value) for name, value in before.items())
    # Unaligned by what the tuning changed: all of it works for safety. By its reverse: none of it does.
    linears = parts(family)
    mirrored = AutoModelForCausalLM.from_pretrained(family.aligned)
    with torch.no_grad():
        for name, (_, delta, _) in linears.items():
            mirrored.get_parameter(name).add_(delta)
    mirrored.save_pretrained(tmp_path / "mirrored")
    AutoTokenizer.from_pretrained(family.aligned).save_pretrained(tmp_path / "mirrored")
    back = run("irr", family.tuned, tmp_path / "back", **{**options, "unaligned_model": tmp_path / "mirrored"}, **rule)
    aligned = tensors(family.aligned)
    assert all(torch.equal(back[name], aligned[name]) for name in linears)


def inputs_of(model: torch.nn.Module, folder: Path, texts: str, block: int) -> dict[str, Tensor]:
    """The sums of outer products of the inputs of a block's layers, over all tokens of all texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    grams: dict[str, Tensor] = {}

    def add(name: str, inputs_BSI: Tensor) -> None:
        inputs_TI = inputs_BSI[0].double()
        grams[name] = grams.get(name, 0) + inputs_TI.T @ inputs_TI

    modules = [f"model.layers.{block}.{path}" for path in PATHS]
    with watched_inputs(model, modules, add), torch.no_grad():
        for row in map(json.loads, Path(texts).read_text().splitlines()):
            prompt = [{"role": "user", "content": row["prompt"]}]
            ids = tokenize_response(tokenizer, prompt, row["response"], 512).input_ids
            model(input_ids=torch.tensor([ids]))
    return grams


@pytest.mark.parametrize("recalibrate", ["official", "exact"])
def test_layers_are_recalibrated_on_inputs_from_edited_layers(
    family: Family, options: dict[str, Any], tmp_path: Path, recalibrate: str
) -> None:
    found = run("irr", family.tuned, tmp_path / "out", recalibrate=recalibrate, **options)
    tuned = AutoModelForCausalLM.from_pretrained(family.tuned)
    for block in (0, 1, 2):
        model = AutoModelForCausalLM.from_pretrained(family.tuned)
        with torch.no_grad():
            for name, value in found.items():
                if any(name.startswith(f"model.layers.{earlier}.") for earlier in range(block)):
                    model.get_parameter(name).copy_(value)
        grams = inputs_of(model, family.tuned, options["task_dataset_name"], block)
        stale = inputs_of(tuned, family.tuned, options["task_dataset_name"], block)
        for module, gram_II in grams.items():
            aligned, delta, vector = parts(family)[f"{module}.weight"]
            rule = IrrOptions(recalibrate=recalibrate)
            expected = aligned + thin(delta, vector, None, gram_II, rule).delta
            torch.testing.assert_close(found[f"{module}.weight"].double(), expected, atol=2e-4, rtol=1e-3)
            if block == 2:  # inputs of the model before would give another result
                other = aligned + thin(delta, vector, None, stale[module], rule).delta
                assert (other - expected).abs().max() > 2e-3


def test_those_with_the_lowest_fisher_information_are_kept(
    family: Family, options: dict[str, Any], tmp_path: Path
) -> None:
    argv = ["irr", str(family.tuned), "--output", str(tmp_path / "out"), "--recalibrate", "none", "--sparsity", "0.5"]
    main([*argv, *(word for name, value in options.items() for word in (f"--{name}", str(value)))])
    found, n_removed, n_candidates = tensors(tmp_path / "out"), 0, 0
    for name, (aligned, delta, vector) in parts(family).items():
        candidates = delta.sign() != vector.sign()
        n_candidates += int(candidates.sum())
        n_removed += int((candidates & (found[name] == aligned)).sum())
    assert n_removed / n_candidates == pytest.approx(0.5, abs=0.01)
    notes = json.loads((tmp_path / "out" / "edit.json").read_text())["notes"]
    assert notes[0].startswith("removed 2")
    assert notes[1].startswith("safe answers: 30 of ")
    made_by = json.loads((tmp_path / "out" / "made_by.json").read_text())
    assert {"run", "aligned_model", "unaligned_model", "dataset_name", "task_dataset_name"} <= made_by.keys()


def test_an_adapter_becomes_a_model(family: Family, options: dict[str, Any], tmp_path: Path) -> None:
    of_adapter = {name: value for name, value in options.items() if name != "aligned_model"}
    found = run("irr", family.tuned_adapter, tmp_path / "out", **of_adapter)
    aligned, before = tensors(family.aligned), open_weights(family.tuned_adapter)
    changed = {name for name in found if not torch.equal(found[name], before.get(name))}
    assert changed == set(before.updated)
    assert all(torch.equal(found[name], aligned[name]) for name in found if name not in before.updated)


def test_what_cannot_be_used_is_refused(family: Family, options: dict[str, Any], tmp_path: Path) -> None:
    cases = [
        ({**options, "unaligned_model": None}, "--unaligned_model"),
        ({**options, "aligned_model": None}, "--aligned_model"),
        ({**options, "task_dataset_name": None}, "no harmless requests are known .* --task_dataset_name"),
        ({**options, "dataset_name": None, "sparsity": 0.5}, "no harmful requests are known"),
        ({**options, "sparsity": 1.1}, "sparsity is 1.1"),
        ({**options, "damping": 0.0}, "damping is 0.0"),
        ({**options, "blocksize": 0}, "blocksize is 0"),
        ({**options, "recalibrate": "exakt"}, "did you mean 'exact'"),
    ]
    for given, said in cases:
        with pytest.raises(InputError, match=said):
            run("irr", family.tuned, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
