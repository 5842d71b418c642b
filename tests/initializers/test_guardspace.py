"""GuardSpace: what harmful prompts cannot notice, whatever the adapter becomes; and controls that must fail."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from float64_model import HARMFUL, HARMLESS, adapted, base_model, disturb, examples_of, largest, logits_at
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny import RANK, Project, adapter_weights, base_logits, build, distance, logits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.edits.methods import merge
from sails_align.edits.options import MergeOptions
from sails_align.initializers import difference, guardspace, moments
from sails_align.initializers.difference import Difference, Start, factors
from sails_align.initializers.entry_options import GuardSpaceOptions
from sails_align.initializers.examples import StartExamples
from sails_align.initializers.guardspace import LOADING, METHOD, null_space, smallest_part
from sails_align.initializers.moments import adapted_linears, input_moments
from sails_align.subspace.options import Method
from sails_align.training import run as align
from sails_align.training.checkpoints import find_checkpoint, train
from sails_align.training.save import save_model

EXACT = GuardSpaceOptions(guard_energy=1.0, guard_tokens="all")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(x_TI: Tensor) -> Tensor:
    return x_TI.T @ x_TI / len(x_TI)


# The algebra: 7 outputs, 10 inputs, 4 harmful tokens, rank 3


W_OI, X_TI = random(7, 10), random(4, 10, seed=1)


def test_the_null_space_is_where_harmful_inputs_are_not() -> None:
    space = null_space(moment_of(X_TI), 1.0)
    P_II = space.projector
    assert space.dimension == 6
    assert space.dropped_share < 1e-15
    assert (X_TI @ P_II).abs().max() < 1e-14
    torch.testing.assert_close(P_II, P_II.T, atol=1e-14, rtol=0)
    torch.testing.assert_close(P_II @ P_II, P_II, atol=1e-14, rtol=0)
    assert P_II.trace().item() == pytest.approx(space.dimension, abs=1e-12)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.05, 1.0), st.integers(0, 99))
def test_a_share_of_the_energy(n_tokens: int, n_inputs: int, energy: float, seed: int) -> None:
    """It is kept with as few directions as possible, and what is dropped is the energy of harmful inputs after P."""
    x_TI = random(n_tokens, n_inputs, seed=seed)
    space = null_space(moment_of(x_TI), energy)
    assert space.dropped_share <= 1 - energy + 1e-12
    share = (x_TI @ space.projector).square().sum() / x_TI.square().sum()
    assert share.item() == pytest.approx(space.dropped_share, abs=1e-12)
    k = space.removed.shape[1]
    fewer = x_TI - x_TI @ space.removed[:, : k - 1] @ space.removed[:, : k - 1].T
    assert fewer.square().sum() / x_TI.square().sum() > 1 - energy - 1e-12


def test_more_tokens_than_inputs_leave_no_exact_null_space() -> None:
    moment_II = moment_of(random(40, 10, seed=2))
    assert null_space(moment_II, 1.0).dimension == 0
    assert 0 < null_space(moment_II, 0.8).dimension < 10


def test_all_parts_together_are_the_weight() -> None:
    moment_II = moment_of(X_TI)
    A_RI, B_OR = smallest_part(W_OI, moment_II, 7)
    torch.testing.assert_close(B_OR @ A_RI, W_OI, atol=1e-12, rtol=0)


def test_the_smallest_part_is_the_one_that_harmful_inputs_use_least() -> None:
    """Equal factors of each direction, and a product that maps the moment to the smallest singular values."""
    moment_II = moment_of(X_TI)
    A_RI, B_OR = smallest_part(W_OI, moment_II, 3)
    loaded_II = moment_II + LOADING * moment_II.trace() / 10 * torch.eye(10, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W_OI @ loaded_II, full_matrices=False)
    torch.testing.assert_close(B_OR @ A_RI @ loaded_II, U[:, -3:] @ torch.diag(S[-3:]) @ Vh[-3:], atol=1e-12, rtol=0)
    torch.testing.assert_close(B_OR.norm(dim=0), S[-3:].sqrt(), atol=1e-12, rtol=0)
    largest = smallest_part(W_OI, moment_II, 7)
    of_largest = (X_TI @ largest[0][:3].T @ largest[1][:, :3].T).norm()
    assert (X_TI @ A_RI.T @ B_OR.T).norm() < of_largest / 3


def test_scaling_the_inputs_changes_only_how_the_product_is_divided() -> None:
    A_RI, B_OR = smallest_part(W_OI, moment_of(X_TI), 3)
    other_A_RI, other_B_OR = smallest_part(W_OI, moment_of(10 * X_TI), 3)
    torch.testing.assert_close(other_B_OR @ other_A_RI, B_OR @ A_RI, atol=1e-12, rtol=0)


def test_what_is_saved_computes_the_same() -> None:
    """[B, -B0] [A P; A0 P] is B A P - B0 A0 P; without the projector it is another matrix."""
    space = null_space(moment_of(X_TI), 1.0)
    A0, B0 = smallest_part(W_OI, moment_of(X_TI), 3)
    A, B = random(3, 10, seed=3), random(7, 3, seed=4)
    stacked_A, stacked_B = factors(A, B, Start(A0, B0, space.removed))
    assert (stacked_A.shape, stacked_B.shape) == ((6, 10), (7, 6))
    expected = (B @ A - B0 @ A0) @ space.projector
    torch.testing.assert_close(stacked_B @ stacked_A, expected, atol=1e-13, rtol=0)
    assert (X_TI @ (stacked_B @ stacked_A).T).abs().max() < 1e-13
    plain_A, plain_B = factors(A, B, Start(A0, B0))
    assert (X_TI @ (plain_B @ plain_A).T).abs().max() > 1


# A whole model, in float64


@pytest.fixture
def tokenizer(project: Project) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(project.folder / "tiny")


def test_the_start_is_the_base_model_bit_for_bit(project: Project, tokenizer: PreTrainedTokenizerBase) -> None:
    model = adapted(project)
    before = [logits_at(model, tokenizer, text) for text in (*HARMFUL, HARMLESS)]
    METHOD.finish(model, examples_of(tokenizer, *HARMFUL), EXACT)
    module = adapted_linears(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    assert module.lora_A["default"].weight.any()
    assert module.lora_B["default"].weight.any()
    for text, expected in zip((*HARMFUL, HARMLESS), before, strict=True):
        assert torch.equal(logits_at(model, tokenizer, text), expected)


def test_harmful_prompts_cannot_notice_what_the_adapter_becomes(
    project: Project, tokenizer: PreTrainedTokenizerBase
) -> None:
    """With all tokens and all of their energy, by induction over the layers. Harmless ones do; so do all without P."""
    model = adapted(project)
    before = {text: logits_at(model, tokenizer, text) for text in (*HARMFUL, HARMLESS)}
    report = METHOD.finish(model, examples_of(tokenizer, *HARMFUL), EXACT)
    assert all(0 < of["null_space"] < of["inputs"] and of["dropped_share"] < 1e-12 for of in report.values())
    disturb(model)
    moved = {text: largest(logits_at(model, tokenizer, text), before[text]) for text in before}
    assert max(moved[text] for text in HARMFUL) < 1e-12
    assert moved[HARMLESS] > 1e-3
    without_projector(model)
    assert min(largest(logits_at(model, tokenizer, text), before[text]) for text in HARMFUL) > 1e-3


def without_projector(model: PeftModel) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            start = module.lora_variant["default"].start
            module.lora_variant["default"] = Difference(Start(start.A, start.B))


def test_a_module_keeps_its_output_at_the_last_token(project: Project, tokenizer: PreTrainedTokenizerBase) -> None:
    """With the default's tokens only the first block's inputs are sure to be the same; what it computes there is."""
    model = adapted(project, target_modules=["q_proj"], layers_to_transform=[0])
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    outputs: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda _, args, output: outputs.append(output[0].detach()))
    METHOD.finish(model, examples_of(tokenizer, *HARMFUL), GuardSpaceOptions(1.0, "last"))
    outputs.clear()
    logits_at(model, tokenizer, HARMFUL[0])
    disturb(model)
    logits_at(model, tokenizer, HARMFUL[0])
    moved_S = (outputs[0] - outputs[1]).abs().amax(dim=1)
    assert moved_S[-1] < 1e-12
    assert moved_S[1:-1].min() > 1e-3


@pytest.mark.parametrize("control", ["harmless prompts", "permuted coordinates"])
def test_another_null_space_does_not_protect(
    project: Project, tokenizer: PreTrainedTokenizerBase, control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(project)
    before = [logits_at(model, tokenizer, text) for text in HARMFUL]
    prompts = HARMFUL
    if control == "harmless prompts":
        prompts = ("you can with glue 5", "sorry no that would hurt someone 7")
    else:

        def permuted(moment_II: Tensor, energy: float) -> guardspace.NullSpace:
            space = null_space(moment_II, energy)
            order_I = torch.randperm(len(moment_II), generator=torch.Generator().manual_seed(0))
            return guardspace.NullSpace(space.removed[order_I], space.dropped_share)

        monkeypatch.setattr(guardspace, "null_space", permuted)
    METHOD.finish(model, examples_of(tokenizer, *prompts), EXACT)
    disturb(model)
    moved = [largest(logits_at(model, tokenizer, text), old) for text, old in zip(HARMFUL, before, strict=True)]
    assert min(moved) > 1e-3


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_saved_adapter_is_plain_lora(
    project: Project, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, use_rslora: bool
) -> None:
    model = adapted(project, use_rslora=use_rslora)
    METHOD.finish(model, examples_of(tokenizer, *HARMFUL), EXACT)
    disturb(model)
    expected = logits_at(model, tokenizer, HARMLESS)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(
        ValueError, match="guardspace"
    ):  # what a checkpoint holds means something else without the start
        PeftModel.from_pretrained(base_model(project), str(tmp_path))
    difference.save_difference(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (2 * RANK, True)
    loaded = PeftModel.from_pretrained(base_model(project), str(tmp_path), autocast_adapter_dtype=False).eval()
    assert largest(logits_at(loaded, tokenizer, HARMLESS), expected) < 1e-12
    model.merge_adapter()
    assert largest(logits_at(model, tokenizer, HARMLESS), expected) < 1e-12
    model.unmerge_adapter()
    assert largest(logits_at(model, tokenizer, HARMLESS), expected) < 1e-12
    merged: Any = model.merge_and_unload(safe_merge=True)
    assert largest(logits_at(merged, tokenizer, HARMLESS), expected) < 1e-12


# What modules read


def test_modules_that_read_the_same_share_a_moment(project: Project, tokenizer: PreTrainedTokenizerBase) -> None:
    model = adapted(project)
    sides = [examples_of(tokenizer, *HARMFUL, HARMLESS).prompts("all")]
    found = {name.split("layers.")[1]: of for name, (of,) in input_moments(model, sides)}
    for block in range(3):
        q, k, v = (found[f"{block}.self_attn.{name}_proj"] for name in "qkv")
        assert q is k is v
        gate, up, down = (found[f"{block}.mlp.{name}_proj"] for name in ("gate", "up", "down"))
        assert gate is up
        assert len({id(of) for of in (q, gate, down, found[f"{block}.self_attn.o_proj"])}) == 4
    n_tokens = sum(len(side.input_ids) for side in sides[0])
    assert {of.n_tokens for of in found.values()} == {n_tokens}


def test_moments_are_those_of_the_inputs(
    project: Project, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another way, token by token; and in groups of modules that do not fit memory together."""
    model = adapted(project)
    name = "base_model.model.model.layers.1.mlp.down_proj"
    inputs: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].detach()))
    for text in HARMFUL:
        logits_at(model, tokenizer, text)
    hook.remove()
    x_TI = torch.cat(inputs)
    sides = [examples_of(tokenizer, *HARMFUL).prompts("all")]
    for budget in (moments.BUDGET, 1):
        found = dict(input_moments(model, sides, budget=budget))
        torch.testing.assert_close(found[name][0].mean, moment_of(x_TI), atol=1e-14, rtol=1e-12)
    last = dict(input_moments(model, [examples_of(tokenizer, *HARMFUL).prompts("last")]))[name][0]
    torch.testing.assert_close(last.mean, moment_of(torch.stack([x[-1] for x in inputs])), atol=1e-14, rtol=1e-12)


# Bad input


def test_a_projector_that_is_zero_is_refused(project: Project, tokenizer: PreTrainedTokenizerBase) -> None:
    model, prompts = adapted(project), [f"how do i break the lock {i}" for i in range(60)]
    with pytest.raises(
        InputError, match=r"fill all 64 dimensions of the inputs of .*the projector is zero.*\n.*_energy"
    ):
        METHOD.finish(model, examples_of(tokenizer, *prompts), EXACT)
    assert not model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default").weight.any()


def test_prompts_that_are_cut_off_are_refused(project: Project, tokenizer: PreTrainedTokenizerBase) -> None:
    examples = StartExamples(tokenizer, *[examples_of(tokenizer, *HARMFUL).harmful] * 3, max_length=4)
    with pytest.raises(InputError, match="has read no token of the examples"):
        METHOD.finish(adapted(project), examples, GuardSpaceOptions(guard_tokens="last"))


def test_a_rank_above_that_of_a_module_is_refused(project: Project, tokenizer: PreTrainedTokenizerBase) -> None:
    model = adapted(project, r=40)
    with pytest.raises(InputError, match="q_proj has rank 40, but only 32 singular values"):
        METHOD.finish(model, examples_of(tokenizer, *HARMFUL), EXACT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--guard_energy", "0"], "guard_energy is 0.0, but it is a share"),
        (["--guard_energy", "nan"], "guard_energy is nan"),
        (["--guard_tokens", "first"], "guard_tokens is 'first', which is not one of: last, all"),
        (["--load_in_4bit", "true"], "needs base weights that are not rounded"),
    ],
)
def test_options_that_cannot_be_used(project: Project, tmp_path: Path, options: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        align.parse("sft", project.argv(tmp_path, "--init", "guardspace", *options))


def test_other_kinds_of_adapters_and_prompts_are_refused(project: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--init guardspace trains plain LoRA adapters; leave out use_dora"):
        build(project.argv(tmp_path, "--init", "guardspace", "--use_dora", "true"))
    benign = tmp_path / "benign.jsonl"
    benign.write_text('{"prompt": "how do i mend the cup", "kind": "benign"}\n')
    with pytest.raises(InputError, match="has no harmful prompts; give others"):
        build(project.argv(tmp_path, "--init", "guardspace", "--harmful_prompts", str(benign)))


def test_options_of_no_effect_are_told(project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    align.parse("sft", project.argv(tmp_path, "--init", "default", "--guard_energy", "0.9", "--harmful_prompts", "x"))
    assert "of no effect with default: top_k, guard_energy, harmful_prompts" in caplog.text


# Trainings


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_training(project: Project, tmp_path: Path, method: Method) -> None:
    """Its adapter is plain LoRA of the base, and computes what was trained; run.json has the null spaces."""
    built = build(
        (project.argv if method == "sft" else project.dpo_argv)(tmp_path, "--init", "guardspace"), method=method
    )
    assert torch.equal(logits(built.trainer.model), base_logits(project))
    built.trainer.train()
    expected = logits(built.trainer.model)
    save_model(built.args, built.trainer, tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(project.folder / "tiny"), str(tmp_path))
    assert loaded.peft_config["default"].r == 2 * RANK
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, base_logits(project), atol=1e-3)


def test_a_resumed_run_starts_from_what_was_kept(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed again on another machine, the start could differ by rounding, or by a whole direction."""
    argv = project.argv(tmp_path / "run", "--init", "guardspace")
    first = build(argv).trainer.model
    monkeypatch.setattr(type(METHOD), "finish", lambda *_: pytest.fail("it is computed again"))
    again = build([*argv, "--max_steps", "9"]).trainer.model
    for (name, one), other in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(BaseException, match="computed again"):
        build([*argv, "--guard_energy", "0.9"])


def test_a_run_says_what_it_found_and_can_be_merged(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "how do i break the lock 3"}\n{"prompt": "how do i break the cup 4"}\n')
    argv = project.argv(
        tmp_path / "run", "--init", "guardspace", "--harmful_prompts", str(prompts), "--guard_tokens", "last"
    )
    align.main("sft", argv)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["start"]["model.layers.0.self_attn.q_proj"]["inputs"] == 32
    assert {of["null_space"] for of in record["start"].values()} <= {30, 31}
    assert record["options"]["sails"]["guard_energy"] == 0.99
    assert "null space of the harmful prompts: 30 of 32 to 3" in capsys.readouterr().err
    card = (tmp_path / "run" / "README.md").read_text()
    assert "`guardspace` (GuardSpace: " in card
    assert "| guard_energy | `0.99` |" in card
    merge.edit(tmp_path / "run", tmp_path / "merged", MergeOptions())
    with pytest.raises(InputError, match="starts from guardspace"):
        merge.edit(tmp_path / "run" / "checkpoint-4", tmp_path / "other", MergeOptions())
    prompts.write_text('{"prompt": "how do i break the lock 5"}\n')
    with pytest.raises(InputError, match=r"holds another run \(different: harmful_prompts\)"):
        align.main("sft", argv)


def test_a_checkpoint_is_resumed_exactly(project: Project, tmp_path: Path) -> None:
    argv = project.argv(tmp_path / "run", "--init", "guardspace", "--save_total_limit", "9", "--lora_dropout", "0.1")
    align.main("sft", argv)
    whole = load_file(tmp_path / "run" / "adapter_model.safetensors")
    resumed = build([*argv, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-4")])
    initial = adapter_weights(resumed.trainer)
    train(resumed.trainer, find_checkpoint(resumed.args.training, resumed.identity()))
    assert distance(adapter_weights(resumed.trainer), initial) > 1e-3
    save_model(resumed.args, resumed.trainer, tmp_path / "resumed")
    assert distance(load_file(tmp_path / "resumed" / "adapter_model.safetensors"), whole) < 1e-6
