"""A finished run becomes a plain model that computes the same; what does not is refused, and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import WEIGHTS, edit_config, edit_weights, empty_tensor, lose_tensor, nan_tensor, save_adapter
from huggingface_hub import ModelCard
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import logits, save_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sails_align import edits
from sails_align.cli import check_adapter, edit
from sails_align.cli import main as sails
from sails_align.core.errors import InputError, exit_on_input_error
from sails_align.edits.methods.merge import check_logits, merge_adapter
from sails_align.edits.options import MergeOptions
from sails_align.models.adapters import load_base_config, read_adapter
from sails_align.testbed.build import ASSETS
from sails_align.training import run as align

SHORT = ["--max_steps", "2", "--save_steps", "1", "--eval_examples", "4", "--disable_tqdm", "true"]
MERGED_FILES = {
    "README.md",
    "made_by.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of the testbed; do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    rate = ["--learning_rate", "0.02"]  # two steps that can be seen
    align.main("sft", [*SHORT, *rate, "--model_name_or_path", str(ASSETS), "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_model(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base)


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command, which must end with exit code 2; returns its message."""

    def run(command: Callable[[list[str]], None], *argv: object) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended, exit_on_input_error():
            command([str(word) for word in argv])
        assert ended.value.code == 2
        message = capfd.readouterr().err.partition("error: ")[2].strip()
        assert 1 <= len(message.splitlines()) <= 3
        assert "Traceback" not in message
        return message

    return run


def unmerged(folder: Path, base: Path) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(model, str(folder))


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


# What is merged


def test_a_run_of_the_testbed(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deep" / "merged"
    edit.main(["merge", str(finished), "--output", str(output)])
    assert {path.name for path in output.iterdir()} == MERGED_FILES
    assert {path.name for path in output.parent.iterdir()} == {"merged"}
    expected = logits(unmerged(finished, ASSETS / "model"))
    model = AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager")
    assert largest(logits(model), expected) <= 1e-5 * expected.abs().max()
    base = AutoModelForCausalLM.from_pretrained(ASSETS / "model", attn_implementation="eager")
    assert largest(logits(base), expected) > 0.1, "the adapter does something"
    assert "(786,816 parameters, float32)" in capsys.readouterr().out
    config = AutoConfig.from_pretrained(output)
    assert config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(output / "model.safetensors")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    tokenizer, own = AutoTokenizer.from_pretrained(output), AutoTokenizer.from_pretrained(finished)
    assert tokenizer.chat_template == own.chat_template
    assert tokenizer("how do i mend the cup") == own("how do i mend the cup")
    assert ModelCard.load(output / "README.md").data.library_name == "transformers"
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in output.iterdir())


def test_what_is_printed(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (adapter / "run.json").write_text(json.dumps({"options": {"model": {"load_in_4bit": True}}}))
    edit.main(["merge", str(adapter), "--output", str(tmp_path / "merged"), "--dtype", "bfloat16", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "by at most" in printed
    assert "rounding  to bfloat16 changes logits by up to" in printed
    assert "--dtype float32 keeps all precision" in printed
    assert "trained on a quantized base model" in printed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"use_dora": True},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"o_proj": 1}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "gate_proj"]},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_adapters_of_a_llama(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save_adapter(tmp_path / "adapter", base, **options)
    merged = edits.run("merge", folder, tmp_path / "merged", MergeOptions(device="cpu"))
    expected = logits(unmerged(folder, base))
    assert largest(logits(AutoModelForCausalLM.from_pretrained(merged.folder)), expected) <= 1e-5
    assert 0 <= merged.difference <= 1e-5
    assert 0 <= merged.written <= 1e-5
    assert largest(logits(AutoModelForCausalLM.from_pretrained(base)), expected) > 0.1
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template, "the base model's own"


def test_an_adapter_that_changed_the_base_but_was_converted(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    model.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "as it is"))
    with pytest.raises(InputError, match="starts from pissa, which changed the base weights"):
        merge_adapter(tmp_path / "as it is", tmp_path / "merged")
    model.save_pretrained(str(tmp_path / "run"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    merged = merge_adapter(tmp_path / "run", tmp_path / "merged")
    assert largest(logits(AutoModelForCausalLM.from_pretrained(merged.folder)), expected) <= 1e-4


def test_types(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The base model's own unless another is asked for; rounding is told as a number."""
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(base).save_pretrained(half)
    expected = logits(unmerged(adapter, half))
    for dtype, wanted in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        merged = merge_adapter(adapter, tmp_path / f"{dtype}", base_model=str(half), dtype=dtype)
        assert merged.dtype == wanted
        assert {tensor.dtype for tensor in load_file(merged.folder / "model.safetensors").values()} == {wanted}
        assert AutoConfig.from_pretrained(merged.folder).dtype == wanted
        assert merged.difference <= 1e-5
        found = logits(AutoModelForCausalLM.from_pretrained(merged.folder, dtype="auto"))
        rounded = wanted == torch.bfloat16
        assert (1e-4 < merged.written < 0.5) == (1e-4 < largest(found, expected) < 0.5) == rounded


def test_a_folder_that_is_there_and_empty_is_filled(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    assert (merge_adapter(adapter, tmp_path / "merged").folder / "model.safetensors").is_file()


def test_merge_is_short_for_edit_merge(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for command in (["merge"], ["edit", "merge"]):
        sails([*command, str(adapter), "--output", str(tmp_path / "merged"), "--device", "cpu"])
        printed.append((capsys.readouterr().out, load_file(tmp_path / "merged" / "model.safetensors")))
        shutil.rmtree(tmp_path / "merged")
    (short, short_weights), (long, long_weights) = printed
    assert short == long
    assert "card      " in short
    assert short_weights.keys() == long_weights.keys()
    assert all(torch.equal(short_weights[name], long_weights[name]) for name in long_weights)


def test_help_of_edits(capsys: pytest.CaptureFixture[str]) -> None:
    sails(["edit", "--help"])
    listed = capsys.readouterr().out
    assert all(f"edit {name} " in listed and entry.summary in listed for name, entry in edits.EDITS.items())
    with pytest.raises(SystemExit):
        sails(["edit", "merge", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{option.name}" in shown for option in fields(MergeOptions))


# What is detected


def tamper(model: torch.nn.Module) -> None:
    weight = model.get_parameter("model.layers.1.self_attn.v_proj.weight")
    weight.data.view(-1)[7] += 0.1


def test_a_tampered_weight_is_detected(adapter: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(merge_adapter(adapter, tmp_path / "merged").folder)
    expected = logits(model)
    assert check_logits(logits(model), expected) == 0
    tamper(model)
    with pytest.raises(InputError, match="the merged model is wrong"):
        check_logits(logits(model), expected)
    with pytest.raises(InputError, match="differ from the unmerged model's by nan"):
        check_logits(expected * float("nan"), expected)


def test_an_adapter_with_large_weights_is_merged(finished: Path, tmp_path: Path) -> None:
    """As after a training that diverged: its updates are much larger than the weights, and rounded more coarsely."""
    adapter = shutil.copytree(finished, tmp_path / "adapter")
    torch.manual_seed(0)
    edit_weights(adapter, lambda tensors: [tensor.normal_(std=0.6) for tensor in tensors.values()])
    merged = merge_adapter(adapter, tmp_path / "merged")
    assert 0 < merged.difference < 1e-4 * merged.largest_logit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_merge_is_not_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    merge = LoraModel.merge_and_unload

    def wrong(self: LoraModel, **options: Any) -> Any:
        model = merge(self, **options)
        tamper(model)
        return model

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    with pytest.raises(InputError, match="the merged model is wrong"):
        merge_adapter(adapter, tmp_path / "merged", dtype=dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_what_is_written_wrongly_is_detected(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = PreTrainedModel.save_pretrained

    def wrong(self: PreTrainedModel, folder: Path, **options: Any) -> None:
        save(self, folder, **options)
        tensors = load_file(Path(folder) / "model.safetensors")
        tensors["model.layers.1.self_attn.v_proj.weight"].view(-1)[7] += 0.1
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", wrong)
    with pytest.raises(InputError, match="the merged model is wrong"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_tied_embeddings_is_refused(tmp_path: Path) -> None:
    """Merged into the embeddings, it would change the head, too."""
    adapter = save_adapter(tmp_path / "adapter", ASSETS / "model", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(InputError, match="serve the adapter itself instead"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# What is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: edit_weights(folder, lose_tensor), "1 tensor is missing"),
        (lambda folder: edit_weights(folder, empty_tensor), "1 tensor is empty"),
        (lambda folder: edit_weights(folder, nan_tensor), "1 tensor is not finite"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), "is damaged"),
        (lambda folder: (folder / WEIGHTS).unlink(), "is missing"),
        (lambda folder: edit_config(folder, init_lora_weights="olora"), "starts from olora"),
        (lambda folder: edit_config(folder, peft_type="VERA"), "'VERA'"),
        (lambda folder: edit_config(folder, base_model_name_or_path="/no/such/model"), "--base_model"),
        (lambda folder: edit_config(folder, r=5), "does not fit the model"),
    ],
)
def test_adapters_that_cannot_be_merged(fails, adapter: Path, tmp_path: Path, change, said: str) -> None:
    change(adapter)
    assert said in fails(edit.main, "merge", adapter, "--output", tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_an_adapter_that_trained_embeddings_too(tmp_path: Path, saved: list[str]) -> None:
    """The testbed's model shares one matrix for both; after training there are two."""
    base = ASSETS / "model"
    adapter = save_adapter(tmp_path / "adapter", base, modules_to_save=saved)

    def train(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "lora_" not in name]:
            tensors[name] = tensors[name] * 1.1

    edit_weights(adapter, train)
    edit.main(["merge", str(adapter), "--output", str(tmp_path / "merged"), "--dtype", "float32"])
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_with_biases_of_its_own_is_not_merged(fails, base: Path, tmp_path: Path) -> None:
    """The base's layers have no bias to add them to."""
    adapter = save_adapter(tmp_path / "adapter", base, lora_bias=True)
    assert "cannot be merged: Impossible" in fails(edit.main, "merge", adapter, "--output", tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_bases_that_it_was_not_trained_on(fails, finished: Path, base: Path, tmp_path: Path) -> None:
    output = ["--output", tmp_path / "merged"]
    assert "does not fit the model" in fails(edit.main, "merge", finished, *output, "--base_model", base)
    twin = Path(shutil.copytree(ASSETS / "model", tmp_path / "twin"))
    tensors = load_file(twin / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    message = fails(edit.main, "merge", finished, *output, "--base_model", twin)
    assert "was trained on another model" in message
    assert "(different: model.safetensors)" in message
    (twin / "model.safetensors").unlink()
    assert "different: model.safetensors" in fails(edit.main, "merge", finished, *output, "--base_model", twin)
    assert {path.name for path in tmp_path.iterdir()} == {"twin"}
    edit.main(["merge", str(finished), "--output", str(tmp_path / "merged"), "--base_model", "testbed"])


def test_commits_of_the_base_are_compared(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the hub's model is known only to transformers."""
    (adapter / "run.json").write_text(json.dumps({"identity": {"model": {"name": "x/y", "commit": "c1"}}}))

    def found(commit: str | None) -> None:
        name, config = load_base_config(read_adapter(adapter))
        config._commit_hash = commit
        monkeypatch.setattr("sails_align.edits.methods.merge.load_base_config", lambda *_: (name, config))

    found("c2")
    with pytest.raises(InputError, match="different: commit c1, here c2"):
        merge_adapter(adapter, tmp_path / "merged")
    for commit in ("c1", None):
        found(commit)
        merge_adapter(adapter, tmp_path / f"merged {commit}")


def test_a_quantized_base(adapter: Path, base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "quantized"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(InputError, match="is quantized"):
        merge_adapter(adapter, tmp_path / "merged", base_model=str(copy))


def test_outputs_and_options(fails, adapter: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "notes.txt", adapter):
        assert "exists and is not empty" in fails(edit.main, "merge", adapter, "--output", output)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    new = ["--output", tmp_path / "merged"]
    assert "a part of the path is a file" in fails(
        edit.main, "merge", adapter, "--output", tmp_path / "notes.txt" / "x"
    )
    assert "'float8'" in fails(edit.main, "merge", adapter, *new, "--dtype", "float8")
    assert "device is 'tpu'" in fails(edit.main, "merge", adapter, *new, "--device", "tpu")
    assert "--output" in fails(edit.main, "merge", adapter)
    assert "holds a whole model" in fails(edit.main, "merge", base, *new)
    assert "there is no folder" in fails(edit.main, "merge", tmp_path / "nowhere", *new)
    assert not (tmp_path / "merged").exists()


# check-adapter


def test_check_adapter(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_adapter.main([str(finished)])
    printed = capsys.readouterr().out
    assert "vLLM can serve it:" in printed
    command = f"vllm serve {ASSETS}/model --enable-lora --max-lora-rank 8 --lora-modules run={finished}"
    assert printed.splitlines()[-1].startswith(command)


def test_check_adapter_says_what_is_wrong(fails, adapter: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_config(adapter, use_dora=True)
    with pytest.raises(SystemExit) as ended:
        check_adapter.main([str(adapter)])
    assert ended.value.code == 1
    printed = capfd.readouterr().out
    assert "problem   it is DoRA" in printed
    assert "-> serve the merged model: sails merge" in printed
    assert "problem   it is not whole: 12 tensors are missing" in printed, "the magnitudes"
    assert "vLLM cannot serve it as it is" in printed
    edit_config(adapter, use_dora=False)
    with pytest.raises(SystemExit) as ended:
        sails(["check-adapter", "--help"])
    assert ended.value.code == 0
    assert "usage: sails check-adapter" in capfd.readouterr().out
    assert "there is no folder" in fails(check_adapter.main, adapter / "nowhere")
    assert "there is no model" in fails(check_adapter.main, adapter, "--base_model", "./nowhere")
