"""SC-LoRA: the directions are the best ones, the start is the base model, and what is saved is plain LoRA."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from float64_model import HARMFUL, HARMLESS, adapted, base_model, disturb, examples_of, largest, logits_at
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from tiny import RANK, Project, build
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.initializers.difference import save_difference
from sails_align.initializers.entry_options import ScLoraOptions
from sails_align.initializers.examples import StartExamples, whole
from sails_align.initializers.moments import adapted_linears, input_moments
from sails_align.initializers.sc_lora import METHOD, output_directions
from sails_align.training import run as align

W_OI = torch.randn(7, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def moment(n_tokens: int, seed: int) -> Tensor:
    x_TI = torch.randn(n_tokens, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x_TI.T @ x_TI / n_tokens


TASK_II, HARMFUL_II = moment(3, seed=1), moment(3, seed=2)


def reward(basis_OR: Tensor, beta: float, task_II: Tensor = TASK_II, harmful_II: Tensor = HARMFUL_II) -> float:
    """What the paper's directions make as large as possible."""
    return ((1 - beta) * _energy(basis_OR, task_II) - beta * _energy(basis_OR, harmful_II)).item()


def _energy(basis_OR: Tensor, moment_II: Tensor) -> Tensor:
    return (basis_OR.T @ W_OI @ moment_II @ W_OI.T @ basis_OR).trace()


@given(st.integers(1, 7), st.floats(0, 1), st.integers(0, 99))
def test_no_other_directions_are_better(rank: int, beta: float, seed: int) -> None:
    basis_OR = output_directions(W_OI, TASK_II, HARMFUL_II, beta, rank).basis
    torch.testing.assert_close(basis_OR.T @ basis_OR, torch.eye(rank, dtype=torch.float64), atol=1e-12, rtol=0)
    other_OR = torch.linalg.qr(
        torch.randn(7, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).Q
    assert reward(basis_OR, beta) >= reward(other_OR, beta) - 1e-12


def test_beta_decides_between_task_and_harm() -> None:
    """0: the principal directions of the task's outputs; 1: those where harmful prompts have no energy at all."""
    task_OO = W_OI @ TASK_II @ W_OI.T
    principal_OR = torch.linalg.eigh(task_OO).eigenvectors[:, -3:]
    found = output_directions(W_OI, TASK_II, HARMFUL_II, 0.0, 3)
    torch.testing.assert_close(found.basis @ found.basis.T, principal_OR @ principal_OR.T, atol=1e-12, rtol=0)
    assert found.task_share == pytest.approx(1)
    assert found.harmful_share > 0.1
    assert output_directions(W_OI, TASK_II, HARMFUL_II, 1.0, 4).harmful_share < 1e-12
    shares = [output_directions(W_OI, TASK_II, HARMFUL_II, beta, 3).harmful_share for beta in (0.0, 0.5, 0.9, 1.0)]
    assert shares == sorted(shares, reverse=True)


def test_the_two_sides_are_not_the_same() -> None:
    """A control: with task and harm confused, the directions are worse."""
    right, wrong = (output_directions(W_OI, *of, 0.5, 3).basis for of in ((TASK_II, HARMFUL_II), (HARMFUL_II, TASK_II)))
    assert reward(right, 0.5) > 0 > reward(wrong, 0.5)


@pytest.fixture
def tokenizer(project: Project) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(project.folder / "tiny")


def examples(tokenizer: PreTrainedTokenizerBase) -> StartExamples:
    rows = [{"prompt": [{"role": "user", "content": HARMLESS}], "chosen": "you can with glue 7"}]
    task = Dataset.from_list(rows)
    return StartExamples(tokenizer, task, task, examples_of(tokenizer, *HARMFUL).harmful)


def test_the_directions_are_those_of_outputs(project: Project, tokenizer: PreTrainedTokenizerBase) -> None:
    """Of W x, summed up without the outputs; and the adapter starts there, with the part of W that writes there."""
    model, given = adapted(project), examples(tokenizer)
    name = "base_model.model.model.layers.1.mlp.up_proj"
    module = adapted_linears(model)[name]
    outputs: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, output: outputs.append(output[0].detach()))
    sides = [[whole(side) for side in given.responses(given.train)], given.prompts("all")]
    moments = dict(input_moments(model, sides))[name]
    hook.remove()
    W_OI = module.get_base_layer().weight.double()
    h_TO = outputs[0]
    expected = h_TO.T @ h_TO / len(h_TO)
    torch.testing.assert_close(W_OI @ moments[0].mean @ W_OI.T, expected, atol=1e-13, rtol=1e-10)
    METHOD.finish(model, given, ScLoraOptions(0.3))
    basis_OR = output_directions(W_OI, moments[0].mean, moments[1].mean, 0.3, RANK).basis
    A_RI, B_OR = module.lora_A["default"].weight, module.lora_B["default"].weight
    torch.testing.assert_close(B_OR @ B_OR.T, basis_OR @ basis_OR.T, atol=1e-10, rtol=0)
    torch.testing.assert_close(module.scaling["default"] * B_OR @ A_RI, B_OR @ B_OR.T @ W_OI, atol=1e-12, rtol=0)


def test_start_and_saved_adapter(project: Project, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = adapted(project)
    before = logits_at(model, tokenizer, HARMLESS)
    METHOD.finish(model, examples(tokenizer), ScLoraOptions())
    assert torch.equal(logits_at(model, tokenizer, HARMLESS), before)
    disturb(model)
    expected = logits_at(model, tokenizer, HARMLESS)
    assert largest(expected, before) > 1e-3
    model.save_pretrained(str(tmp_path))
    save_difference(model, tmp_path)
    loaded = PeftModel.from_pretrained(base_model(project), str(tmp_path), autocast_adapter_dtype=False).eval()
    assert loaded.peft_config["default"].r == 2 * RANK
    assert largest(logits_at(loaded, tokenizer, HARMLESS), expected) < 1e-12


def test_a_run(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    align.main("sft", project.argv(tmp_path / "run", "--init", "sc_lora", "--sc_lora_beta", "0.9"))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["options"]["sails"]["sc_lora_beta"] == 0.9
    shares = record["start"]["model.layers.0.self_attn.q_proj"]
    assert 0 <= shares["harmful_share"] < shares["task_share"] <= 1
    assert "of the energy of the task and " in capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (2 * RANK, True)


def test_bad_input(project: Project, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sc_lora_beta is 1\.5, but it is a weight"):
        ScLoraOptions(1.5)
    with pytest.raises(InputError, match=r"there are no harmless examples;\ngive --helpful_dataset_name; or name"):
        METHOD.finish(adapted(project), examples_of(tokenizer, *HARMFUL), ScLoraOptions())
    with pytest.raises(InputError, match="q_proj has rank 40, but only 32 outputs"):
        METHOD.finish(adapted(project, r=40), examples(tokenizer), ScLoraOptions())
    with pytest.raises(InputError, match="--init sc_lora trains plain LoRA adapters; leave out use_dora"):
        build(project.argv(tmp_path, "--init", "sc_lora", "--use_dora", "true"))
