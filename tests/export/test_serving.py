"""What vLLM can serve, and what it is told to do about the rest."""

import json
import shlex
from pathlib import Path

import pytest
from adapters import (
    MODULES,
    edit_config,
    edit_weights,
    empty_tensor,
    lose_tensor,
    nan_tensor,
    save_adapter,
)
from tiny import save_model
from transformers import AutoConfig, Gemma2Config, PreTrainedConfig

from sails_align.core.errors import InputError
from sails_align.evaluation.backends.serving import MAX_LORA_RANKS, max_lora_rank, serve_command, serving_report
from sails_align.models.adapters import read_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


def blocking(folder: Path, config: PreTrainedConfig) -> list[str]:
    return [problem.what for problem in serving_report(folder, config) if problem.blocking]


@pytest.mark.parametrize(
    ("rank", "allowed"),
    [(1, 1), (2, 8), (8, 8), (9, 16), (16, 16), (64, 64), (65, 128), (257, 320), (321, 512), (512, 512), (513, None)],
)
def test_the_smallest_rank_that_is_allowed(rank: int, allowed: int | None) -> None:
    assert max_lora_rank(rank) == allowed
    assert allowed is None or allowed == min(value for value in MAX_LORA_RANKS if value >= rank)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": [*MODULES, "gate_proj", "up_proj", "down_proj"]},
        {"target_modules": r".*layers\.[02]\.self_attn\.(q|o)_proj"},
        {"layers_to_transform": [0, 2]},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}},  # the values of all
    ],
)
def test_what_is_served_as_it_is(base: Path, tmp_path: Path, options: dict) -> None:
    folder = save_adapter(tmp_path / "adapter", base, **options)
    assert blocking(folder, AutoConfig.from_pretrained(base)) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "biases"),
        ({"bias": "lora_only"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules (lm_head"),
        ({"rank_pattern": {"k_proj": 2}}, "another rank (2)"),
        ({"alpha_pattern": {"k_proj": 2}}, "another scale"),
        ({"r": 600}, "rank is 600, and vLLM takes at most 512"),
        ({"init_lora_weights": "pissa"}, "initialization (pissa) changed the base weights"),
        ({"init_lora_weights": "olora"}, "initialization (olora) changed the base weights"),
        ({"target_modules": ["lm_head", "q_proj"]}, "it adapts lm_head"),
        ({"target_modules": ["embed_tokens"]}, "it adapts model.embed_tokens"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    ],
)
def test_what_is_not_served(base: Path, tmp_path: Path, options: dict, said: str) -> None:
    folder = save_adapter(tmp_path / "adapter", base, **options)
    problems = [problem for problem in serving_report(folder, AutoConfig.from_pretrained(base)) if problem.blocking]
    assert [said in problem.what for problem in problems] == [True], problems
    assert any(word in problems[0].remedy for word in ("sails merge", "another --init", "serve it with transformers"))


@pytest.mark.parametrize(
    ("change", "said"), [(lose_tensor, "1 tensor is missing"), (empty_tensor, "is empty"), (nan_tensor, "not finite")]
)
def test_damaged_tensors(base: Path, tmp_path: Path, change, said: str) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    edit_weights(folder, change)
    problems = blocking(folder, AutoConfig.from_pretrained(base))
    assert len(problems) == 1
    assert said in problems[0]


def test_another_base_and_other_types(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    config = AutoConfig.from_pretrained(base)
    config.num_hidden_layers = 2
    assert "is of another model: 8 tensors" in blocking(folder, config)[0]
    edit_weights(folder, lambda tensors: tensors.update({name: value.double() for name, value in tensors.items()}))
    assert blocking(folder, AutoConfig.from_pretrained(base)) == ["its weights are F64; vLLM reads F32, F16, BF16"]
    edit_config(folder, r="many")
    with pytest.raises(InputError, match="r is 'many'"):
        serving_report(folder, config)


def test_what_depends_on_the_device_is_only_noted(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    narrow = serving_report(folder, AutoConfig.from_pretrained(base))
    assert [(problem.blocking, problem.what[:31]) for problem in narrow] == [(False, "the model's heads are 16 wide, ")]
    config = AutoConfig.from_pretrained(base)
    config.dtype = "float32"
    assert "the model is float32" in serving_report(folder, config)[1].what


def test_gemma_2_with_sixteen_directions(base: Path, tmp_path: Path) -> None:
    """Heads' width is not d_model / heads there."""
    config = Gemma2Config(vocab_size=90, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=32,
                          num_attention_heads=4, num_key_value_heads=2, dtype="bfloat16")  # fmt: skip
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    folder = save_adapter(tmp_path / "adapter", tmp_path / "gemma", r=16)
    assert serving_report(folder, AutoConfig.from_pretrained(tmp_path / "gemma")) == []


def test_the_command(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "my run", base, r=9)
    words = ["vllm", "serve", "google/gemma-2-2b", "--enable-lora", "--max-lora-rank", "16"]
    words += ["--lora-modules", f"my-run={folder}", "--generation-config", "vllm"]
    assert shlex.split(serve_command(read_adapter(folder), "google/gemma-2-2b")) == words
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    words[-1] = str(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "run.json").write_text(json.dumps({"options": {"model": {"model_revision": "v2"}}}))
    words += ["--revision", "v2", "--chat-template", f"{folder}/chat_template.jinja"]
    assert shlex.split(serve_command(read_adapter(folder), "google/gemma-2-2b")) == words
