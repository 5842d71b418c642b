"""Gemma 3 with its vision tower, saved as the hub has it: trained, merged and asked as any language model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hub_cache import add_model, add_to_cache, narrow
from hub_configs import CONFIGS
from paths import RECIPES, ROOT
from safetensors.torch import load_file
from tiny import SENTENCES, Project, make_project
from transformers import AutoModelForCausalLM
from warm import Warm

from sails_align.cli.estimate import main as estimate
from sails_align.edits.methods.merge import merge_adapter
from sails_align.evaluation.backends.hf import HFBackend
from sails_align.evaluation.records import Sampling
from sails_align.models.load import load_model, load_truncated
from sails_align.models.spec import ModelSpec
from sails_align.subspace.options import Method
from sails_align.training import run as align

TEMPLATE = RECIPES / "templates" / "human_assistant.jinja"
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
N_LAYERS = 7  # the sixth is one without a sliding window


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = narrow(CONFIGS["gemma-3-4b"])
    config["text_config"] |= {"num_hidden_layers": N_LAYERS}
    cache = tmp_path_factory.mktemp("hub")
    add_model(cache, "google/gemma-3-4b-pt", config)
    return add_to_cache(cache, "google/gemma-3-4b-pt", "config.json").parent


def train(method: Method, model: Path, data: Project, output_dir: Path, *more: str) -> dict[str, Any]:
    argv = (data.argv if method == "sft" else data.dpo_argv)(output_dir)
    return align.main(method, [*argv, "--model_name_or_path", str(model), "--chat_template_path", str(TEMPLATE), *more])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_all_weights_but_those_of_the_vision_tower_are_trained(
    method: Method, model: Path, data: Project, tmp_path: Path
) -> None:
    metrics = train(method, model, data, tmp_path, "--use_peft", "false")
    before, after = weights(model), weights(tmp_path)
    assert before.keys() == after.keys()
    seen = {name for name in before if name.startswith(("vision_tower", "multi_modal_projector"))}
    assert 0 < len(seen) < len(before)
    assert {name for name in before if torch.equal(before[name], after[name])} == seen
    n = {"seen": sum(before[name].numel() for name in seen), "all": sum(t.numel() for t in before.values())}
    assert metrics["cost"]["trainable_parameters"] == n["all"] - n["seen"]
    shape = estimate(["--method", method, "--model_name_or_path", str(model), "--use_peft", "false"])["shape"]
    assert (shape["n_trainable"], shape["n_parameters"]) == (n["all"] - n["seen"], n["all"])
    assert all((tmp_path / name).read_text() == (model / name).read_text() for name in PROCESSOR)


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj", "o_proj"], ["all-linear"]])
def test_plain_lora_then_merged_and_asked(targets: list[str], model: Path, data: Project, tmp_path: Path) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    metrics = train("sft", model, data, run, "--init", "default", "--lora_target_modules", *targets)
    tensors = load_file(run / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in tensors)
    n_modules = N_LAYERS * (4 if len(targets) > 1 else 7)
    assert len(tensors) == 2 * n_modules
    n_trained = sum(tensor.numel() for tensor in tensors.values())
    assert metrics["cost"]["trainable_parameters"] == n_trained
    options = ["--init", "default", "--lora_r", "4", "--lora_target_modules", *targets]
    shape = estimate(["--method", "sft", "--model_name_or_path", str(model), *options])["shape"]
    assert shape["n_trainable"] == n_trained

    merge_adapter(run, merged, dtype=torch.float32)
    assert {name for name, tensor in weights(merged).items() if torch.equal(tensor, weights(model)[name])} >= {
        name for name in weights(model) if name.startswith(("vision_tower", "multi_modal_projector"))
    }
    assert all((merged / name).is_file() for name in PROCESSOR)
    assert type(AutoModelForCausalLM.from_pretrained(merged)).__name__ == "Gemma3ForConditionalGeneration"
    specs = {
        "adapter": ModelSpec("a", str(model), str(run), str(run), {}, dtype="float32"),
        "merged": ModelSpec("m", str(merged), None, str(merged), {}, dtype="float32"),
    }
    conversations = [[{"role": "user", "content": text}] for text in SENTENCES]
    found = {}
    for name, spec in specs.items():
        with torch.no_grad():
            logits = load_model(spec, "cpu")(input_ids=torch.arange(5, 45).view(4, 10)).logits
        completions = HFBackend(spec).complete(conversations, Sampling(max_new_tokens=6))
        found[name] = logits, {index: completion.text for index, completion in completions}
    torch.testing.assert_close(found["adapter"][0], found["merged"][0], atol=1e-4, rtol=1e-4)
    assert found["adapter"][1] == found["merged"][1]
    assert None not in found["merged"][1].values(), "every conversation is answered"


@pytest.mark.distributed
def test_two_processes_train_all_weights(model: Path, data: Project, warm: Warm, tmp_path: Path) -> None:
    """DDP ends with an error if a parameter that is trained gets no gradient, as those of the tower would."""
    launcher = ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), "--main_process_port", "0"]
    more = ["--chat_template_path", str(TEMPLATE), "--max_steps", "2", "--use_peft", "false"]
    argv = [*data.argv(tmp_path / "run"), "--model_name_or_path", str(model), *more]
    command = ["accelerate", "launch", *launcher, str(RECIPES / "sft_sails.py"), *argv]
    done = warm.run(command, variables={"HF_DATASETS_CACHE": str(data.folder / "cache")})
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights(tmp_path / "run").keys() == weights(model).keys()


def test_discovery_loads_the_language_model_alone(model: Path) -> None:
    decoder = load_truncated(model, 2)
    assert type(decoder).__name__ == "Gemma3TextModel"
    assert sum(1 for name, _ in decoder.named_parameters() if "vision" in name) == 0
