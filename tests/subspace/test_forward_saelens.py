"""Discovery gives what SAELens and TransformerLens give by their own caching, on the same weights."""

import importlib.util
from types import ModuleType

import pytest
import torch
from paths import ROOT

BENCHMARK = ROOT / "benchmarks" / "discovery.py"


@pytest.fixture(scope="module")
def discovery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("discovery_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_same_as_saelens(discovery: ModuleType) -> None:
    whole = discovery.random_model(discovery.SMALL)
    saes = discovery.random_saes(whole, [0, 1], d_sae=256)
    sides = {side: list(made) for side, made in discovery.random_sides(5, discovery.SMALL["vocab_size"]).items()}
    setting = discovery.Setting(whole, discovery.truncate(whole, 1), saes, sides)
    mine, theirs = discovery.run_ours(setting), discovery.run_cached(setting, discovery.hooked(whole))
    for layer in (0, 1):
        assert torch.allclose(mine[layer], theirs[layer], atol=1e-2 * mine[layer].abs().max().item())
        assert (mine[layer] - theirs[layer]).norm() < 0.01 * mine[layer].norm()
    assert (mine[0] - theirs[1]).norm() > 0.5 * mine[0].norm()  # the control: another layer is another result
