"""Adapters on a base model in 4 or 8 bits: exact at the start, on weights that stay as they are, saved as any other.

bitsandbytes computes this on a CPU, too.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from tiny import Project, adapter_weights, build, distance, logits
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, set_seed

from sails_align.cli import edit
from sails_align.models.adapters import read_json
from sails_align.models.load import exact_attention
from sails_align.models.parameters import count_parameters
from sails_align.models.quantized import quantization_of, use_one_layout
from sails_align.training import run as align

NF4 = ["--load_in_4bit", "true", "--bnb_4bit_quant_type", "nf4"]
QUANTIZATIONS = {
    "nf4": NF4,
    "nested": [*NF4, "--use_bnb_nested_quant", "true"],
    "fp4": ["--load_in_4bit", "true", "--bnb_4bit_quant_type", "fp4"],
    "8bit": ["--load_in_8bit", "true"],
}


@pytest.fixture(scope="module")
def gemma(project: Project) -> Path:
    """A tiny Gemma 2, with soft-capping strong enough to be seen, and sliding windows shorter than the examples."""
    folder = project.folder / "gemma"
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "tiny")
    tokenizer.save_pretrained(folder)
    llama = json.loads((project.folder / "tiny" / "config.json").read_text())
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    tokens = ("num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id")
    config = Gemma2Config(
        **{name: llama[name] for name in (*shape, *tokens)}, head_dim=16, sliding_window=4, attn_logit_softcapping=0.1
    )
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def of(folder: Path) -> list[str]:
    return ["--model_name_or_path", str(folder), "--sae_allow_mismatch", "true"]


def quantized_base(folder: Path, run: Path) -> torch.nn.Module:
    """The base model, quantized as a run's options say."""
    options = read_json(run / "run.json")["options"]["model"]
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_of(options))
    model.set_attn_implementation(exact_attention(model.config) or "sdpa")
    use_one_layout(model)
    return model


def base_bytes(model: torch.nn.Module) -> dict[str, bytes]:
    """Of every tensor that is not an adapter's, with the scales of the quantized ones."""
    tensors = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    return {
        name: value.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() for name, value in tensors.items()
    }


# Training


@pytest.mark.parametrize("fold_norm", ["false", "true"])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_starts_as_the_quantized_base(
    project: Project, gemma: Path, tmp_path: Path, quantization: str, kind: str, fold_norm: str
) -> None:
    folder = gemma if kind == "gemma" else project.folder / "tiny"
    argv = project.argv(tmp_path, *of(folder), *QUANTIZATIONS[quantization], "--fold_norm", fold_norm)
    built = build(argv)
    options = {name: getattr(built.args.model, name) for name in vars(built.args.model)}
    attention = exact_attention(built.source.model_config)
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_of(options), attn_implementation=attention
    )
    use_one_layout(base)
    expected = logits(base)
    assert torch.equal(logits(built.trainer.model), expected)
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    assert not torch.allclose(logits(whole), expected, atol=1e-3)  # quantization does something
    assert all(p.dtype == torch.float32 for p in built.trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_learns_on_weights_that_stay_as_they_are(project: Project, tmp_path: Path, method: align.Method) -> None:
    argv = project.dpo_argv(tmp_path, *NF4, "--max_steps", "30", "--learning_rate", "0.02")
    built = build(argv, method=method)
    before, adapter = base_bytes(built.trainer.model), adapter_weights(built.trainer)
    expected = logits(built.trainer.model)
    start = built.trainer.evaluate()["eval_loss"]
    built.trainer.train()
    assert built.trainer.evaluate()["eval_loss"] < start - 0.03
    assert base_bytes(built.trainer.model) == before
    assert distance(adapter_weights(built.trainer), adapter) > 1e-2
    assert not torch.allclose(logits(built.trainer.model), expected, atol=1e-2)
    with built.trainer.model.disable_adapter():
        assert torch.equal(logits(built.trainer.model), expected)


@pytest.mark.parametrize("precompute", ["false", "true"])
@pytest.mark.parametrize("start", ["sails", "gaussian", "adapter"])
def test_dpo_starts_at_its_reference(project: Project, tmp_path: Path, start: str, precompute: str) -> None:
    if start == "adapter":
        align.main("sft", project.argv(tmp_path / "sft", *NF4))
    options = ["--adapter_path", str(tmp_path / "sft")] if start == "adapter" else ["--init", start]
    argv = project.dpo_argv(tmp_path / "dpo", *NF4, *options, "--precompute_ref_log_probs", precompute)
    built = build([*argv, "--max_steps", "1", "--logging_steps", "1"], method="dpo")
    if start == "adapter":  # not rounded
        assert distance(adapter_weights(built.trainer), load_file(tmp_path / "sft" / "adapter_model.safetensors")) == 0
    built.trainer.train()
    row = built.trainer.state.log_history[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(row["rewards/chosen"]) <= (1e-5 if precompute == "true" else 0)


def test_another_reference_is_quantized_as_well(project: Project, tmp_path: Path) -> None:
    more = ["--ref_model_name_or_path", str(project.folder / "tiny"), "--max_steps", "1", "--logging_steps", "1"]
    built = build(project.dpo_argv(tmp_path, *NF4, *more), method="dpo")
    built.trainer.train()
    assert built.trainer.state.log_history[0]["rewards/chosen"] == 0


def test_small_changes_of_directions_are_not_lost(project: Project, tmp_path: Path) -> None:
    """At DPO's rate for adapters every number of a factor with the directions moves; in bfloat16 large ones do not."""
    argv = project.dpo_argv(tmp_path, *NF4, "--subspace_mode", "init", "--learning_rate", "1e-5", "--warmup_steps", "0")
    built = build([*argv, "--lr_scheduler_type", "constant", "--max_steps", "2"], method="dpo")
    before = adapter_weights(built.trainer)
    built.trainer.train()
    assert built.init is not None
    module = next(m for m in built.init.modules if m.side == "B")
    name = f"{module.name}.lora_B.weight"
    after = adapter_weights(built.trainer)[name]
    assert (after != before[name]).float().mean() > 0.9
    large = before[name].abs() > 0.05
    assert (after.bfloat16() != before[name].bfloat16())[large].float().mean() < 0.1


def test_all_weights_are_counted(project: Project, tmp_path: Path) -> None:
    whole, quantized = (
        count_parameters(build(project.argv(tmp_path / str(len(more)), *more)).trainer.model) for more in ([], NF4)
    )
    assert whole == quantized


# What is left behind


@pytest.fixture(scope="module")
def finished(project: Project, gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny Gemma 2 in 4 bits; do not change it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    align.main("sft", project.argv(run, *of(gemma), *NF4, "--save_total_limit", "9"))
    return run


def test_the_adapter_is_for_any_form_of_its_base(gemma: Path, finished: Path) -> None:
    trained = logits(PeftModel.from_pretrained(quantized_base(gemma, finished), str(finished)))
    again = AutoPeftModelForCausalLM.from_pretrained(
        finished,
        attn_implementation="eager",
        quantization_config=quantization_of(read_json(finished / "run.json")["options"]["model"]),
    )
    use_one_layout(again)
    assert torch.equal(logits(again), trained)
    whole = AutoPeftModelForCausalLM.from_pretrained(finished, attn_implementation="eager")
    assert (logits(whole) - trained).abs().max() > 1e-3
    with whole.disable_adapter():
        base = logits(whole)
    assert torch.equal(base, logits(AutoModelForCausalLM.from_pretrained(gemma, attn_implementation="eager")))
    assert (logits(whole) - base).abs().max() > 1e-2


def test_merging_tells_how_far_it_is(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit.main(["merge", str(finished), "--output", str(tmp_path / "merged"), "--device", "cpu"])
    printed = capsys.readouterr().out
    told = float(printed.split("of what was trained by up to ")[1].split(";")[0])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    unmerged = AutoPeftModelForCausalLM.from_pretrained(finished, attn_implementation="eager")
    torch.testing.assert_close(logits(merged), logits(unmerged), atol=1e-5, rtol=1e-5)
    assert told > 1e-2


def test_merging_a_run_in_8_bits_whose_dtype_is_the_checkpoints(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = project.argv(tmp_path / "run", *QUANTIZATIONS["8bit"], "--dtype", "auto", "--max_steps", "1")
    align.main("sft", argv)
    edit.main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged"), "--device", "cpu"])
    assert "of what was trained by up to " in capsys.readouterr().out


def test_resuming_ends_where_a_whole_run_ends(project: Project, gemma: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoint-4", tmp_path / "checkpoint-4")
    options = ["--save_total_limit", "9", "--resume_from_checkpoint", "true"]
    align.main("sft", project.argv(tmp_path, *of(gemma), *NF4, *options))
    files = [load_file(run / "adapter_model.safetensors") for run in (tmp_path, finished)]
    assert distance(*files) == 0
    assert {tensor.dtype for tensor in files[0].values()} == {torch.float32}
