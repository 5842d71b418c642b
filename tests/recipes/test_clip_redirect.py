"""SafeR-CLIP's example: its losses, its frozen targets, and a short run."""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paths import RECIPES
from torch.nn.functional import cosine_similarity


@pytest.fixture(scope="module")
def recipe() -> Any:
    spec = importlib.util.spec_from_file_location("clip_redirect", RECIPES / "clip_redirect.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loss_has_the_numbers_of_the_specification(recipe: Any):
    unsafe, safe = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert recipe.relative(torch.tensor([[1.0, 1.0]]), unsafe, safe).item() == pytest.approx(math.log(2), abs=1e-6)
    assert recipe.relative(torch.tensor([[3.0, 1.0]]), unsafe, safe).item() == pytest.approx(0.4261, abs=1e-4)


def test_no_row_changes_the_loss_of_another_and_in_the_control_it_does(recipe: Any):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    for loss, is_independent in ((recipe.relative, True), (recipe.info_nce, False)):
        whole, part = loss(*rows)[:4], loss(*(row[:4] for row in rows))
        assert torch.allclose(whole, part, atol=1e-10) == is_independent


def test_the_nearest_is_that_of_a_search(recipe: Any):
    generator = torch.Generator().manual_seed(1)
    queries, pool = (torch.randn(n, 6, generator=generator) for n in (9, 7))
    found = recipe.nearest(queries, pool)
    for query, index in zip(queries, found.tolist(), strict=True):
        assert index == max(range(7), key=lambda i: cosine_similarity(query, pool[i], dim=0).item())


@pytest.fixture(scope="module")
def trained(recipe: Any) -> tuple[Any, Any]:
    """A CLIP after a short pretraining, and its pairs."""
    generator = torch.Generator().manual_seed(0)
    base = recipe.tiny_clip(0)
    recipe.pretrain(base, 120, generator)
    return base.requires_grad_(False), recipe.make_pairs(base, generator, copies=1)


def adapted(recipe: Any, base: Any) -> Any:
    torch.manual_seed(0)
    return recipe.get_peft_model(
        recipe.copy.deepcopy(base), recipe.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1", "fc2"])
    )


def options(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"seed": 0, "epochs": 2, "strength": 1.0, "learning_rate": 1e-2, **changed})


def test_training_moves_both_encoders_to_the_targets_and_never_the_frozen_ones(recipe: Any, trained: tuple[Any, Any]):
    base, (unsafe, safe) = trained
    before = {name: value.clone() for name, value in base.state_dict().items()}
    frozen = {name: value.clone() for name, value in vars(unsafe).items()}
    model = adapted(recipe, base)
    recipe.redirect(model, (unsafe, safe), recipe.relative, options())
    with torch.no_grad():
        moved = recipe.embed_text(model, unsafe.ids), recipe.embed_images(model, unsafe.pixels)
    for embedded, old, target in zip(
        moved, (unsafe.text, unsafe.images), (unsafe.safe_text, unsafe.safe_images), strict=True
    ):
        assert cosine_similarity(embedded, target).mean() > cosine_similarity(old, target).mean()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(torch.equal(value, frozen[name]) for name, value in vars(unsafe).items())


def test_without_strength_the_model_stays(recipe: Any, trained: tuple[Any, Any]):
    """At the start the loss of preservation is at its minimum, so there is nothing to learn."""
    base, (unsafe, safe) = trained
    model = adapted(recipe, base)
    recipe.redirect(model, (unsafe, safe), recipe.relative, options(strength=0.0))
    with torch.no_grad():
        now, old = recipe.embed_text(model, unsafe.ids), unsafe.text
    assert cosine_similarity(now, old).min() > 0.999
    other = adapted(recipe, base)
    recipe.redirect(other, (unsafe, safe), recipe.relative, options())
    with torch.no_grad():
        assert cosine_similarity(recipe.embed_text(other, unsafe.ids), old).min() < 0.99, "control"


def test_a_short_run_prints_its_table_and_writes_its_numbers(recipe: Any, tmp_path: Path, capsys: Any):
    argv = ["--pretraining_steps", "2", "--epochs", "1", "--output_dir", str(tmp_path / "out")]
    rates = recipe.main(argv)
    written = json.loads((tmp_path / "out" / "clip_redirect.json").read_text())
    assert written["rates"] == rates
    assert written["options"]["epochs"] == 1
    assert set(rates) == set(recipe.METHODS)
    assert all(rates[name].keys() == written["n"].keys() for name in rates)
    printed = capsys.readouterr().out
    assert "unsafe captions: unsafe found" in printed
    assert recipe.main(argv) == rates, "the seed decides"


@pytest.mark.parametrize(("option", "value"), [("--epochs", "-1"), ("--strength", "nan"), ("--seed", "x")])
def test_bad_values(recipe: Any, tmp_path: Path, option: str, value: str, capsys: Any):
    with pytest.raises(SystemExit) as error:
        recipe.main([option, value, "--output_dir", str(tmp_path / "out")])
    assert error.value.code == 2
    assert not (tmp_path / "out").exists()
