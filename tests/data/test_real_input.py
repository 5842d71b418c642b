"""Real pretrained weights and real preference pairs, through the commands that docs/recipes.md gives.

SAEs of two layers, discovery, initialisation, 200 steps of training, and the saved adapter loaded by PEFT alone.
The model (260,000 parameters, trained on children's stories) is no chat model: nothing is said here about its safety.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import RECIPES, ROOT
from peft import PeftModel
from processes import PATIENCE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sails_align.cli.train_sae import main as train_sae
from sails_align.saes.train import SAEReport
from sails_align.subspace.basis import Subspace
from sails_align.training import run as align
from sails_align.training.subspace import find_subspace
from sails_align.training.trainer import build_trainer

pytestmark = pytest.mark.slow

TEMPLATE = RECIPES / "templates" / "human_assistant.jinja"
LAYERS, RANK, STEPS = (1, 3), 8, 200
N_PARAMETERS = 5 * RANK * (64 + 32 + 32 + (64 + 64))  # 5 blocks: B of q, k and v, whose A is frozen; A and B of o


@dataclass(frozen=True)
class Real:
    """The inputs, the SAEs trained on them, and the run that started from these."""

    model: Path
    data: Path
    saes: Path
    run: Path
    reports: dict[int, SAEReport]

    def argv(self, output_dir: Path, *more: str) -> list[str]:
        """The documented options; later ones go before earlier ones."""
        paths = options(
            model_name_or_path=self.model,
            sae_path=self.saes,
            dataset_name=self.data,
            chat_template_path=TEMPLATE,
            output_dir=output_dir,
        )
        return [*documented("sails train sft"), *paths, "--disable_tqdm", "true", *more]


def documented(command: str) -> list[str]:
    """The options that docs/recipes.md gives to a command in the example of this test."""
    lines = (ROOT / "docs" / "recipes.md").read_text().replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith(command) and "stories260k" in line]
    return shlex.split(line)[len(command.split()) :]


def options(**values: Any) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def launch(argv: list[str], cache: Path) -> str:
    """`accelerate launch` the recipe; returns what it wrote."""
    launcher = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "recipes/sft_sails.py", *argv]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    model, data = shared / "models" / "stories260k", shared / "data" / "hh_rlhf" / "harmless-base.test.jsonl.gz"
    for path in (model, data):
        if not path.exists():
            pytest.skip(f"no {path}")
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        paths = options(model_name_or_path=model, dataset_name=data, output_dir=folder / "saes")
        reports = train_sae([*documented("sails train-sae"), *paths])
        yield Real(model, data, folder / "saes", folder / "run", reports)


@pytest.fixture(scope="module")
def log(real: Real) -> str:
    """What the launched training wrote."""
    return launch(real.argv(real.run), real.run.parent / "cache")


@pytest.fixture(scope="module")
def metrics(real: Real, log: str) -> dict[str, Any]:
    return json.loads((real.run / "metrics.json").read_text())


def example_ids(real: Real) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(real.model)
    return tokenizer("\n\nHuman: Can I ask you something about pens?\n\nAssistant: Yes", return_tensors="pt")[
        "input_ids"
    ]


@torch.no_grad()
def logits(model: torch.nn.Module, real: Real) -> torch.Tensor:
    return model.eval()(input_ids=example_ids(real)).logits


def base_model(real: Real) -> Any:
    return AutoModelForCausalLM.from_pretrained(real.model)


def test_the_saes_are_good_ones(real: Real) -> None:
    assert tuple(real.reports) == LAYERS
    for report in real.reports.values():
        assert report.explained_variance > 0.9
        assert report.dead_fraction < 0.05
        assert report.loss_recovered is not None
        assert report.loss_recovered > 0.9


def test_the_loss_on_held_out_pairs_falls(metrics: dict[str, Any]) -> None:
    base, trained = metrics["base"]["held_out_loss"], metrics["trained"]["held_out_loss"]
    assert 2 < trained < base - 0.3


def test_no_claim_about_safety_is_made(metrics: dict[str, Any]) -> None:
    assert metrics["base"].keys() == metrics["trained"].keys() == {"held_out_loss"}


def test_what_was_left_out_is_counted(real: Real, log: str, metrics: dict[str, Any]) -> None:
    provenance = metrics["provenance"]
    assert sum(provenance["dropped_rows"].values()) == 9
    assert "9 of 2312 rows" in log
    n_long = provenance["longer_than_max_length"]
    assert n_long["training"] > n_long["held-out"] > 0
    assert f"of {n_long['training']} of 2047 training examples fill max_length 192" in log


def test_provenance_and_cost(real: Real, metrics: dict[str, Any]) -> None:
    provenance, run = metrics["provenance"], json.loads((real.run / "run.json").read_text())
    assert provenance["identity"] == run["identity"]
    assert provenance["options"] == run["options"]
    assert run["identity"]["model"]["name"] == "stories260k"
    assert run["identity"]["options"]["lora_target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert {"torch", "transformers", "trl", "peft", "sae-lens"} <= provenance["versions"].keys()
    for layer in LAYERS:
        report = json.loads((real.saes / f"layer_{layer}" / "report.json").read_text())
        assert provenance["saes"][str(layer)]["hook"] == f"blocks.{layer}.hook_resid_post"
        assert report["layer"] == layer
    assert metrics["cost"]["trainable_parameters"] == N_PARAMETERS
    assert metrics["cost"]["seconds"].keys() == {"prepare", "subspace", "evaluate", "train"}


def test_the_subspace_is_of_the_responses(real: Real, log: str) -> None:
    """HH-RLHF alone has no harmless prompts, so the contrast falls back to the responses, and says so."""
    subspace = Subspace.load(real.run / "subspace")
    assert "no helpful data: the contrast is that of the responses alone" in log
    assert subspace.provenance["features"]["contrast"] == "response"
    assert tuple(subspace.bases) == LAYERS
    for basis_DR in subspace.bases.values():
        assert torch.allclose(basis_DR.T @ basis_DR, torch.eye(basis_DR.shape[1]), atol=1e-5)


def test_training_starts_as_the_base_model(real: Real, metrics: dict[str, Any], tmp_path: Path) -> None:
    """And in the subspace of the launched run: the artifact is used again, since its inputs are the same."""
    artifact = real.run / "subspace" / "subspace.safetensors"
    written = artifact.stat().st_mtime_ns
    args = align.parse("sft", real.argv(tmp_path))
    args, testbed = align.resolved(args)
    source = align.load_source(args, testbed)
    subspace = find_subspace(args, source, real.run / "subspace")
    assert artifact.stat().st_mtime_ns == written
    trainer = build_trainer(args, source, subspace).trainer
    adapted: Any = trainer.model
    assert torch.equal(logits(adapted, real), logits(base_model(real), real))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics["base"]["held_out_loss"], abs=1e-6)
    with torch.no_grad():  # control: the same comparison sees an adapter that does something
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.01)
    assert not torch.equal(logits(adapted, real), logits(base_model(real), real))


def test_peft_alone_loads_what_was_trained(real: Real, metrics: dict[str, Any], tmp_path: Path) -> None:
    """The same logits as the recipe's own model with the last checkpoint's weights, and as the merged model."""
    adapted = PeftModel.from_pretrained(base_model(real), str(real.run))
    loaded = logits(adapted, real)
    assert (loaded - logits(base_model(real), real)).abs().max() > 0.1
    saved = load_file(real.run / "adapter_model.safetensors")
    last = load_file(real.run / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    assert saved.keys() == last.keys()
    assert all(torch.equal(saved[name], last[name]) for name in saved)
    args = align.parse("sft", real.argv(tmp_path, "--init", "default"))
    args, testbed = align.resolved(args)
    source = align.load_source(args, testbed)
    trainer = build_trainer(args, source, None).trainer
    trained: Any = trainer.model
    missing = trained.load_state_dict(
        {name.replace(".weight", ".default.weight"): value for name, value in saved.items()}, strict=False
    )
    assert not missing.unexpected_keys
    assert torch.equal(logits(trained, real), loaded)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics["trained"]["held_out_loss"], abs=1e-6)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, real), loaded, atol=1e-4, rtol=1e-5)


def test_a_second_run_skips_discovery(real: Real, metrics: dict[str, Any], tmp_path: Path) -> None:
    """With fewer steps: the artifact stays as it is, and hardly any time is spent on it."""
    shutil.copytree(real.run / "subspace", tmp_path / "run" / "subspace")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "subspace").iterdir()}
    again = align.main("sft", real.argv(tmp_path / "run", "--max_steps", "1"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "subspace").iterdir()} == written
    ours, theirs = ({**m["provenance"]["identity"], "length": None} for m in (again, metrics))
    assert ours == theirs
    assert again["base"] == pytest.approx(metrics["base"], abs=1e-6)
    assert again["cost"]["seconds"]["subspace"] < metrics["cost"]["seconds"]["subspace"] / 2
