"""The shipped recipes, launched as they are typed, on a hub cache with the files of the real repositories.

Models are narrow, with random weights and as many blocks as the real ones; everything else is what a machine with GPUs
has: the hub's names and file formats, HH-RLHF's files, the recipes' own YAML, `accelerate launch`. No network.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_cache import add_recipe, sae_decoder, widths, write_hh_rlhf
from hub_configs import CONFIGS, SAE_LAYERS, parse
from paths import RECIPES
from processes import PATIENCE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sails_align.initializers.targets import source_layer
from sails_align.models.adapters import check_complete
from sails_align.subspace.basis import Subspace
from sails_align.training import run as align
from sails_align.training.subspace import find_subspace
from sails_align.training.trainer import build_trainer

QUICK = [("dpo", "gemma-3-4b")]
"""The others, of more and larger SAEs, are slow."""
RUNS = [("sft", name) for name in CONFIGS] + [("dpo", "gemma-3-4b"), ("dpo", "llama-3.1-8b")]
PARAMS = [pytest.param(run, marks=() if run in QUICK else pytest.mark.slow, id="-".join(run)) for run in RUNS]
TOP_K, RANK, MODULES = 64, 16, ("q_proj", "k_proj", "v_proj", "o_proj")
SIZES = {  # in place of what the recipes say; nothing else is changed
    "max_steps": 2,
    "max_length": 384,
    "max_discovery_examples": 2,
    "eval_examples": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": "true",
}
LAUNCHER = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


@dataclass(frozen=True)
class Run:
    """A finished run of a recipe."""

    method: str
    name: str
    folder: Path
    argv: list[str]

    @cached_property
    def recipe(self) -> dict[str, Any]:
        return yaml.safe_load((RECIPES / "configs" / self.name / f"{self.method}_sails.yaml").read_text())

    @property
    def layers(self) -> list[int]:
        return SAE_LAYERS[self.name]

    def read(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text())


@pytest.fixture(scope="module")
def place(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What recipes need of the repository, with HH-RLHF; beside it the hub's cache, which is in use."""
    sample = shared / "data" / "hh_rlhf" / "harmless-base.test.jsonl.gz"
    if not sample.is_file():
        pytest.skip(f"no {sample}")
    folder = tmp_path_factory.mktemp("paper")
    write_hh_rlhf(folder / "clone" / "data" / "hh-rlhf", sample)
    (folder / "clone" / "recipes").symlink_to(RECIPES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "clone")
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
        yield folder
    shutil.rmtree(folder)  # SAEs of the real shapes: 2 GB


@pytest.fixture(scope="module")
def added() -> set[str]:
    """The models that the cache has by now."""
    return set()


@pytest.fixture(scope="module", params=PARAMS)
def run(request: pytest.FixtureRequest, place: Path, added: set[str]) -> Run:
    method, name = request.param
    if name not in added:
        add_recipe(place / "hub", name)
        added.add(name)
    folder = place / "clone" / "runs" / f"{method}-{name}"
    more = [word for option, value in SIZES.items() for word in (f"--{option}", str(value))]
    argv = ["--config", f"recipes/configs/{name}/{method}_sails.yaml", "--output_dir", str(folder), *more]
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCHER, f"recipes/{method}_sails.py", *argv]
    caches = {"HF_HUB_CACHE": str(place / "hub"), "HF_DATASETS_CACHE": str(place / "datasets")}
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return Run(method, name, folder, argv)


def test_the_subspace_is_of_the_recipes_saes(run: Run) -> None:
    subspace = Subspace.load(run.folder / "subspace")
    assert list(subspace.bases) == run.layers
    saes = subspace.provenance["saes"]
    for seed, (layer, sae_id) in enumerate(zip(run.layers, run.recipe["sae_ids"], strict=True)):
        assert saes[str(layer)]["source"] == f"{run.recipe['sae_release']}/{sae_id}"
        assert saes[str(layer)]["hook"] == f"blocks.{layer}.hook_resid_post"
        chosen = subspace.provenance["features"]["layers"][str(layer)]["ids"]
        assert len(chosen) == TOP_K < widths(run.name)[0]
        chosen_KD = sae_decoder(*widths(run.name), seed)[chosen]
        basis_DR = subspace.bases[layer]
        outside_DR = basis_DR - torch.linalg.pinv(chosen_KD) @ (chosen_KD @ basis_DR)
        assert outside_DR.norm(dim=0).max() < 0.01, "its directions are combinations of this SAE's"


def test_the_adapter_is_on_every_block_of_the_language_model(run: Run, place: Path) -> None:
    check_complete(run.folder)
    prefix = "model.language_model" if run.name == "gemma-3-4b" else "model"
    n_blocks = parse(CONFIGS[run.name]).get_text_config().num_hidden_layers
    tensors = load_file(run.folder / "adapter_model.safetensors")
    assert tensors.keys() == {
        f"base_model.model.{prefix}.layers.{block}.self_attn.{module}.lora_{side}.weight"
        for block in range(n_blocks)
        for module in MODULES
        for side in "AB"
    }
    assert all(RANK in tensor.shape and tensor.any() for tensor in tensors.values()), "and every part was trained"
    cost, model = run.read("metrics.json")["cost"], base_model(run)
    n_trained = sum(tensor.numel() for tensor in tensors.values())
    assert cost["trainable_parameters"] == n_trained
    assert cost["trainable_share"] == n_trained / (n_trained + sum(p.numel() for p in model.parameters()))


def test_the_run_started_as_the_base_model(run: Run) -> None:
    """The run is made once more up to its first step; discovery is not, since its subspace is there."""
    args = align.parse(run.method, run.argv)  # pyright: ignore[reportArgumentType]
    args, testbed = align.resolved(args)
    source = align.load_source(args, testbed)
    subspace = find_subspace(args, source, run.folder / "subspace")
    built = build_trainer(args, source, subspace)
    trainer, init = built.trainer, built.init
    model: Any = trainer.model
    ids_BS = torch.arange(5, 105).view(4, 25)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids_BS).logits, base_model(run)(input_ids=ids_BS).logits)
    assert init is not None
    for module in init.modules:
        block, _, path = module.name.partition(".layers.")[2].partition(".")
        layer = source_layer(int(block), path, run.layers, "nearest")
        assert module.source_layer == layer
        basis_DR, start = subspace.bases[layer][:, :RANK], init.initial[module.name]
        start_DR = start.T if module.side == "A" else start
        torch.testing.assert_close(start_DR[:, : basis_DR.shape[1]], basis_DR, atol=1e-4, rtol=0)
    with model.disable_adapter():
        base_loss = trainer.evaluate()["eval_loss"]
    started, ended = run.read("base.json")["base"]["held_out_loss"], run.read("metrics.json")["trained"]
    assert started == pytest.approx(math.log(2) if run.method == "dpo" else base_loss, rel=1e-3)
    assert ended["held_out_loss"] != started


def base_model(run: Run) -> Any:
    attention = None if "llama" in run.name or "gemma-3" in run.name else "eager"
    return AutoModelForCausalLM.from_pretrained(
        run.recipe["model_name_or_path"], dtype=torch.bfloat16, attn_implementation=attention
    ).eval()
