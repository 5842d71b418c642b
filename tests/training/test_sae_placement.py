"""SAEs in memory one at a time, or divided among processes: the same subspace, and no more of them at a time."""

import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from sae_lens import SAE
from tiny import SAE_LAYERS, Project
from warm import Warm

from sails_align.subspace import selection as features
from sails_align.subspace.basis import Subspace
from sails_align.subspace.discovery import Pass
from sails_align.training import run as align
from sails_align.training.subspace import find_subspace


def found(project: Project, folder: Path, *more: str) -> Subspace:
    args = align.parse("sft", project.argv(folder, *more))
    args, testbed = align.resolved(args)
    source = align.load_source(args, testbed)
    return find_subspace(args, source, folder)


def n_saes() -> int:
    """SAEs that are in memory."""
    gc.collect()
    return sum(isinstance(thing, SAE) for thing in gc.get_objects())


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many SAEs there were each time that one was used, of those made since."""
    gc.collect()
    gc.freeze()  # what other tests left is many times more, and would be searched each time
    counts: list[int] = []
    update = features.FeatureFitter.update

    def counted(*args: Any, **kwargs: Any) -> None:
        counts.append(n_saes())
        update(*args, **kwargs)

    monkeypatch.setattr(features.FeatureFitter, "update", counted)
    yield counts
    gc.unfreeze()


@pytest.mark.parametrize("init", ["sails", "random_features"])
def test_one_at_a_time_finds_the_same(project: Project, tmp_path: Path, in_memory: list[int], init: str) -> None:
    before = n_saes()
    together = found(project, tmp_path / "all", "--init", init)
    assert max(in_memory) - before == len(SAE_LAYERS) == 2
    in_memory.clear()
    by_layer = found(project, tmp_path / "by_layer", "--init", init, "--sae_placement", "by_layer")
    assert max(in_memory) - before == 1
    assert n_saes() == before
    assert by_layer.tensors().keys() == together.tensors().keys()
    for name, basis_DR in together.tensors().items():
        torch.testing.assert_close(by_layer.tensors()[name], basis_DR, rtol=0, atol=1e-6)
    assert by_layer.provenance["saes"] == together.provenance["saes"]


def test_an_unknown_placement_is_refused(project: Project, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sae_placement is 'some', which is not one of: all, by_layer, sharded"):
        align.parse("sft", project.argv(tmp_path, "--sae_placement", "some"))


@given(st.sampled_from(["all", "by_layer", "sharded"]), st.integers(1, 7), st.integers(1, 17))
def test_every_layer_sees_every_example_once(placement: str, n_layers: int, n_processes: int) -> None:
    n_examples, layers = 40, list(range(3, 3 + n_layers))
    passes = [Pass.of_process(placement, layers, process, n_processes) for process in range(n_processes)]
    read = Counter(
        (layer, example)
        for of_process in passes
        for of in of_process
        for layer in of.layers
        for example in range(of.share, n_examples, of.n_shares)
    )
    assert read == dict.fromkeys(((layer, example) for layer in layers for example in range(n_examples)), 1)
    assert len({len(of_process) for of_process in passes}) == 1  # they wait for each other in each
    if placement == "sharded":
        assert max(len(of.layers) for of_process in passes for of in of_process) == -(-n_layers // n_processes)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("n", "score"),
    [
        (2, "mean_diff"),
        pytest.param(3, "mean_diff", marks=pytest.mark.slow),
        pytest.param(3, "attribution", marks=pytest.mark.slow),
    ],
)
def test_sharded_finds_what_one_process_does(project: Project, warm: Warm, tmp_path: Path, n: int, score: str) -> None:
    """With three processes for two layers, two of them divide the examples."""
    alone = found(project, tmp_path / "alone", "--score", score)
    launch = ["accelerate", "launch", "--config_file", str(ROOT / "accelerate_configs" / "multi_gpu.yaml")]
    launch += ["--num_processes", str(n), "--main_process_port", "0", "-m", "sails_align", "discover"]
    command = [*launch, *project.argv(tmp_path / "run", "--score", score)]
    command += ["--sae_placement", "sharded"]
    done = warm.run(command, variables={"HF_DATASETS_CACHE": str(project.folder / "cache")})
    assert done.returncode == 0, done.stderr[-3000:]
    sharded = Subspace.load(tmp_path / "run" / "subspace")
    for name, basis_DR in alone.tensors().items():
        torch.testing.assert_close(sharded.tensors()[name], basis_DR, rtol=0, atol=1e-4)
