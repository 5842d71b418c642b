"""The loss `sspu`: its directions, what an update may change, its limits (RMU, the model before), and resuming."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file
from tiny import Built, Project, adapter_weights, build, distance, half_harmless
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sails_align.core.errors import InputError
from sails_align.initializers.targets import find_targets
from sails_align.models.norms import norm_gain
from sails_align.subspace.statistics import SideSums, TokenStats
from sails_align.training import run as align
from sails_align.training.losses.sspu import SSPU, control_vector
from sails_align.training.losses.sspu_subspaces import chosen_features, parts_of

OURS = ("--init", "default", "--logging_steps", "1", "--loss", "sspu", "--sspu_features", "4")
MODULES = ("--lora_target_modules", "q_proj", "o_proj", "down_proj")
D = 32


def loss_of(built: Built) -> SSPU:
    cells = [cell.cell_contents for cell in type(built.trainer).compute_loss.__closure__ or ()]
    (loss,) = (each for each in cells if isinstance(each, SSPU))
    return loss


def trained(project: Project, folder: Path, *options: str) -> Built:
    built = build(project.argv(folder, *OURS, *MODULES, "--max_steps", "4", *options))
    built.trainer.train()
    return built


def updates(built: Built) -> dict[str, Tensor]:
    model: Any = built.trainer.model
    adapters: dict[str, Any] = {each.name: each.module for each in find_targets(model, "default")}
    return {name: module.get_delta_weight("default").detach().double() for name, module in adapters.items()}


@pytest.fixture(scope="module")
def hard(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return trained(project, tmp_path_factory.mktemp("hard"), "--weight_decay", "0.1")


def test_the_control_vector_is_in_its_span_and_the_two_spans_are_orthogonal(hard: Built):
    found = loss_of(hard).directions
    assert found is not None
    v_D = loss_of(hard).control(7, 0)
    assert v_D.norm().item() == pytest.approx(1, abs=1e-12)
    assert (v_D - found.irrelevant @ (found.irrelevant.T @ v_D)).norm() < 1e-12
    assert (found.relevant.T @ v_D).abs().max() < 1e-12
    assert set(found.features["relevant"]).isdisjoint(found.features["irrelevant"])


def test_with_one_vector_for_the_run_it_stays_and_else_it_changes():
    basis_DK = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q
    vectors = [control_vector(basis_DK, seed) for seed in (1, 1, 2)]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.allclose(vectors[0], vectors[2])
    whole = control_vector(torch.eye(8, dtype=torch.float64), 1)
    xi = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole, xi / xi.norm()), "RMU's"


def outside(built: Built) -> float:
    """The largest share of an update that is outside of the relevant directions, by matrices of all weights."""
    loss, shares = loss_of(built), []
    assert loss.directions is not None
    all_updates = updates(built)
    for part in loss.parts:
        update = all_updates[part.name]
        residual = update.T if part.side == "A" else update
        basis = part.allowed.double()
        shares.append(((residual - basis @ (basis.T @ residual)).norm() / residual.norm()).item())
    return max(shares)


def test_after_each_step_updates_are_in_the_relevant_span_and_with_a_lambda_they_need_not_be(
    project: Project, tmp_path: Path, hard: Built
):
    assert outside(hard) < 1e-5
    assert {part.side for part in loss_of(hard).parts} == {"A", "B"}
    logged = [row["sspu_outside"] for row in hard.trainer.state.log_history if "sspu_outside" in row]
    assert max(logged) < 1e-8
    free = trained(project, tmp_path, "--sspu_lambda", "0")
    assert outside(free) > 0.5, "control"
    held = trained(project, tmp_path, "--sspu_lambda", "1e4", "--max_steps", "20")
    last = [[row for row in each.trainer.state.log_history if "sspu_outside" in row][-1] for each in (free, held)]
    assert last[1]["sspu_outside"] < 0.5 * last[0]["sspu_outside"]


def test_blocks_after_the_layer_are_not_trained(hard: Built):
    found = loss_of(hard).directions
    assert found is not None
    moved = {name for name, update in updates(hard).items() if update.abs().max() > 0}
    assert moved == {part.name for part in loss_of(hard).parts}
    assert len(moved) < len(updates(hard))
    assert found.layer in (0, 1)


def test_the_penalty_is_that_of_the_whole_matrices(hard: Built):
    torch.manual_seed(0)
    for part in loss_of(hard).parts:
        factors = [part.module.lora_A["default"].weight, part.module.lora_B["default"].weight]
        kept = [factor.detach().clone() for factor in factors]
        with torch.no_grad():
            for factor in factors:
                factor.normal_()
        update = part.module.get_delta_weight("default").detach().double()
        residual, basis = (update.T if part.side == "A" else update), part.allowed.double()
        total, off = (each.item() for each in part.energies())
        assert total == pytest.approx(update.square().sum().item(), rel=1e-5)
        assert off == pytest.approx((residual - basis @ (basis.T @ residual)).square().sum().item(), rel=1e-4)
        with torch.no_grad():
            for factor, before in zip(factors, kept, strict=True):
                factor.copy_(before)


def with_relevant(built: Built, relevant: Tensor) -> Built:
    """The same trainer, with other directions that an update may change."""
    for part in loss_of(built).parts:
        object.__setattr__(part, "allowed", relevant)
    return built


def test_all_directions_allowed_is_rmu_bit_for_bit_and_none_is_the_model_before(project: Project, tmp_path: Path):
    def built(*options: str) -> Built:
        return build(project.argv(tmp_path, *OURS, *MODULES, "--max_steps", "3", *options))

    rmu = built("--sspu_lambda", "0")
    rmu.trainer.train()
    whole = built("--sspu_lambda", "0")
    loss = loss_of(whole)
    loss._options = type(loss._options)(**{**vars(loss._options), "sspu_lambda": None})
    with_relevant(whole, torch.eye(D, dtype=torch.float64))
    loss.begin(whole.trainer)
    whole.trainer.train()
    assert distance(adapter_weights(whole.trainer), adapter_weights(rmu.trainer)) == 0
    none = with_relevant(built(), torch.zeros(D, 0, dtype=torch.float64))
    none.trainer.train()
    assert all(update.abs().max() == 0 for update in updates(none).values())


def test_harmful_answers_move_to_the_vector_and_harmless_ones_stay(project: Project, tmp_path: Path):
    built = trained(project, tmp_path, "--max_steps", "25", "--sspu_retain_weight", "2", "--learning_rate", "0.02")
    rows = [row for row in built.trainer.state.log_history if "sspu_forget" in row]
    assert rows[0]["sspu_retain"] == pytest.approx(0, abs=1e-10)
    assert rows[-1]["sspu_forget"] < rows[0]["sspu_forget"]
    free = trained(project, tmp_path, "--max_steps", "25", "--sspu_retain_weight", "0", "--learning_rate", "0.02")
    last = [row for row in free.trainer.state.log_history if "sspu_forget" in row][-1]
    assert last["sspu_retain"] > rows[-1]["sspu_retain"], "control: without its weight, harmless answers move more"


def test_a_norm_between_a_module_and_the_residual_stream_is_taken_into_account(hard: Built):
    """What a writer may write, times the gain of the norm behind it, is in the relevant span."""
    model, found = hard.trainer.model, loss_of(hard).directions
    assert model is not None
    assert found is not None
    block = model.get_submodule("base_model.model.model.layers.0")
    norm: Any = block.get_submodule("input_layernorm")
    kept = norm.weight.detach().clone()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    reader = next(
        part for part in parts_of(model, _targets(model), found) if part.name.endswith("layers.0.self_attn.q_proj")
    )
    gain_D = norm_gain(block, "self_attn.q_proj")
    assert gain_D is not None
    read_DK = reader.allowed * gain_D.double()[:, None]
    assert (read_DK - found.relevant @ (found.relevant.T @ read_DK)).norm() < 1e-6
    with torch.no_grad():
        norm.weight.copy_(kept)


def _targets(model: nn.Module) -> Any:
    return find_targets(model, "default")  # pyright: ignore[reportArgumentType]


def test_features_are_ranked_by_the_difference_of_means():
    def side(*means: float) -> SideSums:
        sums = torch.tensor(means, dtype=torch.float64)
        return SideSums(torch.tensor(1), sums, sumsq=sums.square(), active=(sums > 0).double())

    stats = TokenStats(
        {("prompt", 0, "aligned"): side(9, 1, 1, 5, 0, 2), ("prompt", 0, "unaligned"): side(1, 7, 4, 5, 0, 2.5)}
    )
    assert chosen_features(stats, 0, 2) == ([1, 2], [5, 3])
    drawn = [chosen_features(stats, 0, 2, control_seed=seed) for seed in range(50)]
    assert {feature for of in drawn for kind in of for feature in kind} == {0, 1, 2, 3, 5}, "all but the dead one"
    assert all(not {*relevant} & {*irrelevant} for relevant, irrelevant in drawn)
    assert chosen_features(stats, 0, 2, control_seed=7) == drawn[7]
    with pytest.raises(InputError, match="only 3 features are more active in harmful answers, and 2 others"):
        chosen_features(stats, 0, 4)


def test_a_resumed_training_is_the_same(project: Project, tmp_path: Path):
    options = (*OURS, *MODULES, "--max_steps", "4", "--save_total_limit", "9", "--sspu_vector", "step")
    argv = project.argv(tmp_path / "run", *options)
    align.main("sft", argv)
    whole = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert "sspu_features" in (tmp_path / "run" / "README.md").read_text(), "the model card"
    resumed = build(argv)
    resumed.trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert distance(adapter_weights(resumed.trainer), whole) < 1e-6


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("dpo", (), "loss is sspu, which is for SFT only"),
        ("sft", ("--use_peft", "false"), "but training starts from full"),
        ("sft", ("--init", "sails"), "but training starts from sails"),
        ("sft", ("--torch_compile", "true"), "torch_compile is true"),
        ("sft", ("--sspu_features", "0"), "sspu_features is 0; choose 1 or more"),
        ("sft", ("--sspu_scale", "0"), "sspu_scale is 0.0; choose a value above 0"),
        ("sft", ("--sspu_vector", "batch"), "sspu_vector is 'batch'"),
        ("sft", ("--sspu_lambda", "-1"), "sspu_lambda is -1.0"),
    ],
)
def test_what_it_cannot_be_used_with(
    project: Project, tmp_path: Path, method: Any, options: tuple[str, ...], said: str
):
    first = () if "--use_peft" in options else ("--init", "default")
    with pytest.raises(InputError) as refused:
        align.parse(method, project.argv(tmp_path, *first, "--loss", "sspu", *options))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sspu_layer", "2"), "there are SAEs of layers 0, 1; choose one"),
        (("--sspu_features", "17"), "17"),
        (("--dataset_name", "helpful"), "no rejected responses"),
    ],
)
def test_data_and_saes_that_do_not_serve(project: Project, tmp_path: Path, options: tuple[str, ...], said: str):
    options = tuple(str(project.folder / f"{word}.jsonl") if word == "helpful" else word for word in options)
    with pytest.raises(InputError) as refused:
        build(project.argv(tmp_path, *OURS, *options))
    assert said in str(refused.value)


def test_answers_to_requests_that_are_said_to_be_harmless_are_not_unlearned(project: Project, tmp_path: Path):
    path = half_harmless(project, tmp_path)
    built = build(project.argv(tmp_path, *OURS, "--dataset_name", str(path)))
    n_harmful = sum(built.source.safety["harmful"][:])
    assert len(loss_of(built)._forget) == n_harmful < len(built.source.safety)


# Swapping the two kinds of features, on a model whose features are known

HARMFUL, HARMLESS = ("break", "lock", "hurt", "someone"), ("mend", "cup", "with", "glue")
OWN, SHARED = [0, 1, 2, 3], [8, 9, 10, 11]


def planted(project: Project, folder: Path) -> list[str]:
    """Return options for a model, an SAE and data in which features 0 to 3 are those of harmful words alone.

    4 to 7 are those of harmless words, and 8 to 11 are active in all words. Hidden states are embeddings until an
    adapter of up_proj changes them.
    """
    torch.manual_seed(0)
    basis_DD = torch.linalg.qr(torch.randn(D, D)).Q
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "tiny")
    model: Any = AutoModelForCausalLM.from_pretrained(project.folder / "tiny")
    with torch.no_grad():
        embeddings_VD = model.get_input_embeddings().weight
        embeddings_VD.copy_(basis_DD[:, SHARED].sum(1).expand_as(embeddings_VD))
        for feature, word in enumerate((*HARMFUL, *HARMLESS)):
            embeddings_VD[tokenizer.convert_tokens_to_ids(word)] += basis_DD[:, feature]
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.up_proj.weight.zero_()
            block.mlp.gate_proj.weight.normal_()
            block.mlp.down_proj.weight.normal_()
    sae = StandardSAE(
        StandardSAEConfig(
            d_in=D, d_sae=D, metadata=SAEMetadata(model_name="planted", hook_name="blocks.1.hook_resid_post")
        )
    )
    with torch.no_grad():
        sae.W_enc.copy_(basis_DD)
        sae.W_dec.copy_(basis_DD.T)
        sae.b_enc.fill_(-0.01)
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "model")
    sae.save_model(folder / "saes" / "layer_1")
    safety = [{"prompt": f"break {i}", "chosen": "sorry no", "rejected": turned(HARMFUL, i)} for i in range(40)]
    helpful = [{"prompt": f"mend {i}", "response": turned(HARMLESS, i)} for i in range(40)]
    for name, rows in {"safety": safety, "helpful": helpful}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--dataset_name", folder / "safety.jsonl", "--helpful_dataset_name", folder / "helpful.jsonl")
    return list(map(str, ("--model_name_or_path", folder / "model", "--sae_path", folder / "saes", *data)))


def turned(words: tuple[str, ...], n: int) -> str:
    start = n % len(words)
    return " ".join(words[start:] + words[:start])


def test_swapping_the_two_kinds_of_features_hurts_what_is_retained_and_forgets_less(project: Project, tmp_path: Path):
    more = ("--lora_target_modules", "up_proj", "--max_steps", "30", "--learning_rate", "0.003")
    argv = project.argv(tmp_path, *planted(project, tmp_path), *OURS, *more, "--sspu_retain_weight", "10")
    left, hurt = [], []
    for is_swapped in (False, True):
        built = build(argv)
        loss, model = loss_of(built), built.trainer.model
        found = loss.directions
        assert found is not None
        assert (sorted(found.features["relevant"]), sorted(found.features["irrelevant"])) == (OWN, SHARED)
        if is_swapped:
            loss.directions = replace(found, relevant=found.irrelevant, irrelevant=found.relevant)
            assert model is not None
            loss.parts[:] = parts_of(model, _targets(model), loss.directions)
            for part in loss.parts:
                part.project()
        built.trainer.train()
        rows = [row for row in built.trainer.state.log_history if "sspu_forget" in row]
        left.append(rows[-1]["sspu_forget"] / rows[0]["sspu_forget"])
        hurt.append(rows[-1]["sspu_retain"])
    assert left[0] < 0.3 < 0.5 < left[1]
    assert hurt[0] < 1e-6 < 1e-4 < hurt[1]
