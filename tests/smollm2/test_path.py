"""The whole path with the real weights, on 8 examples: train, evaluate, measure the divergence."""

import json
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from sails_align.cli.evaluate import divergence, helpfulness, safety
from sails_align.core.errors import InputError
from sails_align.models.spec import model_path
from sails_align.training import run as align

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def weights() -> str:
    try:
        return model_path("smollm2")
    except InputError as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.fixture(scope="module")
def run(weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    config = ["--config", str(ROOT / "recipes/configs/smollm2-135m/sft_sails.yaml")]
    sizes = ["--max_train_examples", "8", "--eval_examples", "4", "--max_steps", "2", "--max_discovery_examples", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        align.main("sft", [*config, *sizes, "--output_dir", str(folder)])
    return folder


def test_the_adapter_starts_in_a_subspace_of_sae_features(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    subspace = json.loads((run / "subspace" / "subspace.json").read_text())
    assert (run / "adapter_model.safetensors").is_file()
    assert record["options"]["model"]["model_name_or_path"]
    assert subspace["provenance"]["features"]


def test_it_is_evaluated_against_its_base(run: Path, weights: str, tmp_path: Path) -> None:
    asked = ["--model", str(run), "--prompts", "twins", "--n_prompts", "2", "--max_new_tokens", "8"]
    files = ["--cache_path", str(tmp_path / "cache.sqlite"), "--progress", "false"]

    def evaluated(command: Any, name: str, *options: str) -> Any:
        return command([*asked, *files, *options, "--output_dir", str(tmp_path / name)])["overall"]

    refused = evaluated(safety, "safety", "--judge", "rules", "--compare", "base")
    assert refused["refusal_rate"]["n"] == 4, "of trained and of held-out categories"
    assert (tmp_path / "safety" / "comparison.json").is_file()
    alike = evaluated(helpfulness, "helpfulness", "--judge", "rouge", "--reference", "smollm2")
    assert alike["likeness"]["n"] == 4
    apart = evaluated(divergence, "divergence")
    assert 0 < apart["kl_per_token"]["value"] < 1, "two steps do not change much"
