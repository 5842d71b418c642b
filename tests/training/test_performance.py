"""Options of speed and memory: each computes what a run without it does, or is refused before anything is computed."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import Project, adapter_weights, build, distance
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

from sails_align.core.errors import InputError
from sails_align.models.load import exact_attention
from sails_align.training import run as align
from sails_align.training.checks import check_machine
from sails_align.training.save import save_model

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
LLAMA = LlamaConfig(**SHAPE)
CAPPED = Gemma2Config(**SHAPE, sliding_window=5, attn_logit_softcapping=0.1)
CONFIGS = {
    "llama": LLAMA,
    "gemma2": CAPPED,
    "gemma3": Gemma3TextConfig(**SHAPE, sliding_window=5),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
}


def keep(gradients: dict[str, torch.Tensor], name: str, gradient: torch.Tensor) -> None:
    gradients[name] = gradient.clone()


def losses(built: Any) -> list[float]:
    """Of each step of a training."""
    built.trainer.train()
    return [row["loss"] for row in built.trainer.state.log_history if "loss" in row]


# Packing


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_examples_do_not_attend_to_each_other(kind: str) -> None:
    """The second of two packed examples has the logits that it has alone, with the attention the recipes use."""
    set_seed(0)
    config = CONFIGS[kind]
    model = AutoModelForCausalLM.from_config(config, attn_implementation=exact_attention(config)).train()
    ids_BS = torch.randint(4, 64, (1, 16))
    positions_BS = torch.cat([torch.arange(9), torch.arange(7)])[None]
    alone_BSV = model(input_ids=ids_BS[:, 9:], use_cache=False).logits
    packed_BSV = model(input_ids=ids_BS, position_ids=positions_BS, use_cache=False).logits[:, 9:]
    torch.testing.assert_close(packed_BSV, alone_BSV, atol=1e-6, rtol=1e-5)
    mixed_BSV = model(input_ids=ids_BS, use_cache=False).logits[:, 9:]
    assert (mixed_BSV - alone_BSV).abs().max() > 0.05


def test_packing_has_the_loss_of_the_same_examples_apart(project: Project, tmp_path: Path) -> None:
    long = ["--max_length", "128"]
    plain, packed = (build(project.argv(tmp_path / value, *long, "--packing", value)) for value in ("false", "true"))
    rows = packed.trainer.eval_dataset
    assert rows is not None
    assert len(rows) < len(plain.trainer.eval_dataset)  # pyright: ignore[reportArgumentType]
    expected = plain.trainer.evaluate()["eval_loss"]
    assert packed.trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_padding_free_is_the_same_training(project: Project, tmp_path: Path) -> None:
    runs = {}
    for value in ("false", "true"):
        more = ["--padding_free", value, "--max_length", "none", "--logging_steps", "1"]
        runs[value] = build(project.argv(tmp_path / value, *more))
    rounding = 1e-3 if torch.cuda.is_available() else 1e-5
    assert losses(runs["true"]) == pytest.approx(losses(runs["false"]), abs=rounding)
    assert distance(*(adapter_weights(run.trainer) for run in runs.values())) < 1e-4


# Checkpointing, compilation


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("kwargs", ["{}", '{"use_reentrant": true}'])
def test_checkpointing_has_the_same_gradients(
    project: Project, tmp_path: Path, kwargs: str, method: align.Method
) -> None:
    """With the sides that read frozen, as the default preset has them."""
    found = []
    for value in ("false", "true"):
        options = ["--gradient_checkpointing", value, "--gradient_checkpointing_kwargs", kwargs]
        built = build(project.dpo_argv(tmp_path / value, *options, "--max_steps", "1"), method=method)
        assert built.args.sails.subspace_mode == "freeze_readers"
        gradients: dict[str, torch.Tensor] = {}
        for name, parameter in built.trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(keep, gradients, name))
        built.trainer.train()
        found.append(gradients)
        assert built.trainer.model.is_gradient_checkpointing == (value == "true")
    assert len(found[0]) > 4
    assert any(gradient.abs().max() > 1e-4 for gradient in found[0].values())
    assert distance(*found) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "backend"),
    [("sft", []), ("dpo", ["--torch_compile_backend", "aot_eager"])],  # the default one compiles for minutes in DPO
    ids=["sft", "dpo"],
)
def test_compiled_training_is_the_same_and_is_saved_as_any_other(
    project: Project, tmp_path: Path, method: align.Method, backend: list[str]
) -> None:
    runs, saved = [], []
    for value in ("false", "true"):
        more = [
            "--torch_compile",
            value,
            *(backend if value == "true" else []),
            "--max_steps",
            "2",
            "--save_steps",
            "1",
            "--logging_steps",
            "1",
        ]
        built = build(project.dpo_argv(tmp_path / value, *more, "--pad_to_multiple_of", "32"), method=method)
        runs.append(losses(built))
        save_model(built.args, built.trainer, tmp_path / value)
        saved.append(load_file(tmp_path / value / "adapter_model.safetensors"))
        checkpoint = load_file(tmp_path / value / "checkpoint-2" / "adapter_model.safetensors")
        assert distance(checkpoint, saved[-1]) == 0
        assert "adapter_update_norm" in built.trainer.state.log_history[0]
    assert runs[1] == pytest.approx(runs[0], abs=1e-4)
    assert distance(*saved) < 1e-3  # which compares the names, too


# What is refused


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("sft", ["--packing", "true", "--packing_strategy", "wrapped"], "attend to each other"),
        ("sft", ["--padding_free", "true"], "--max_length none"),
        ("dpo", ["--padding_free", "true"], "TRL's DPO pads all the same"),
        ("dpo", ["--packing", "true"], "TRL packs examples of SFT only"),
        ("dpo", ["--gradient_checkpointing_kwargs", '{"selective": true}'], "TRL has for SFT only"),
        ("sft", ["--load_in_4bit", "true", "--use_peft", "false"], "rounded weights cannot be trained"),
        ("sft", ["--load_in_8bit", "true", "--init", "pissa"], "leave load_in_8bit out"),
        ("dpo", ["--load_in_4bit", "true", "--init", "olora"], "base weights that are not rounded"),
        ("sft", ["--load_in_4bit", "true", "--init", "orthogonal"], "base weights that are not rounded"),
        ("sft", ["--load_in_4bit", "true", "--dtype", "auto"], "use --dtype bfloat16"),
    ],
)
def test_options_that_contradict_each_other(method: align.Method, options: list[str], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)) as refused:
        align.parse(method, options)
    assert len(str(refused.value).splitlines()) <= 3


def machine(config: PreTrainedConfig, *options: str) -> None:
    check_machine(align.parse("sft", options), config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--attn_implementation", "flash_attention_2"], "trains on GPUs only"),
        (["--attn_implementation", "kernels-community/flash-attn2"], "trains on GPUs only"),
        (["--attn_implementation", "flex_attention"], "trains on GPUs only"),
        (["--model_init_kwargs", '{"attn_implementation": "flash_attention_2"}'], "trains on GPUs only"),
        (["--use_liger_kernel", "true"], "needs a GPU"),
        (["--activation_offloading", "true"], "there is no GPU"),
    ],
)
def test_what_needs_a_gpu(options: list[str], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        machine(LLAMA, *options)


@pytest.mark.parametrize(
    ("options", "package"),
    [
        (["--load_in_4bit", "true"], "bitsandbytes"),
        (["--model_init_kwargs", '{"use_kernels": true}'], "kernels"),
    ],
)
def test_what_needs_a_package(options: list[str], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"sails_align.training.checks.is_{package}_available", lambda: False)
    with pytest.raises(InputError, match=package):
        machine(LLAMA, *options)
    monkeypatch.setattr(f"sails_align.training.checks.is_{package}_available", lambda: True)
    machine(LLAMA, *options)


def test_attention_that_leaves_out_soft_capping_is_refused() -> None:
    with pytest.raises(InputError, match="leaves out the soft-capping of gemma2"):
        machine(CAPPED, "--attn_implementation", "sdpa")
    machine(CAPPED, "--attn_implementation", "eager")
    machine(LLAMA, "--attn_implementation", "sdpa")
    machine(CAPPED)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_is_refused_before_anything_is_computed(project: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no GPU"):
        align.main("sft", project.argv(tmp_path / "run", "--activation_offloading", "true"))
    assert not (tmp_path / "run").exists()


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize(
    ("package", "options", "tolerance"),
    [
        ("flash_attn", ["--attn_implementation", "flash_attention_2"], 0.03),
        ("liger_kernel", ["--use_liger_kernel", "true"], 0.03),
        ("torch", ["--activation_offloading", "true"], 0.03),
        ("bitsandbytes", ["--load_in_4bit", "true", "--dtype", "bfloat16"], 0.2),
    ],
)
def test_options_of_gpus_have_the_losses_of_a_run_without(
    project: Project, tmp_path: Path, package: str, options: list[str], tolerance: float, method: align.Method
) -> None:
    """Up to the rounding of bfloat16, and of 4 bits."""
    pytest.importorskip(package)
    found = []
    for more in ([], options):
        built = build(project.dpo_argv(tmp_path / str(len(more)), *more, "--logging_steps", "1"), method=method)
        check_machine(built.args, built.source.model_config)
        found.append(losses(built))
    assert found[1] == pytest.approx(found[0], abs=tolerance)
