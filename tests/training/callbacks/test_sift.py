"""SIFT: only the chosen entries train, which are those with the largest gradients, and the delta file holds them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Project, build, distance
from torch import Tensor
from transformers import AutoModelForCausalLM

from sails_align.core.errors import InputError
from sails_align.training import run as align
from sails_align.training.callbacks.sift import Sift, largest, quota
from sails_align.training.callbacks.sparse_delta import apply_delta

FULL = ["--use_peft", "false", "--learning_rate", "0.001", "--weight_decay", "0.5"]
ONE_STEP = ["--max_steps", "1", "--warmup_steps", "0", "--save_strategy", "no"]


def base_of(project: Project) -> Any:
    return AutoModelForCausalLM.from_pretrained(project.folder / "tiny")


def sift_of(trainer: Any) -> Sift:
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, Sift))
    return callback


def trained(argv: list[str], method: Any = "sft") -> Any:
    trainer = build(argv, method=method).trainer
    trainer.train()
    return trainer


# Which entries


def test_the_largest_of_three_by_three() -> None:
    gradient = torch.tensor([[0.5, -3.0, 0.1], [2.0, 0.0, -0.2], [1.0, -1.5, 0.3]], dtype=torch.float64)
    assert quota(9, 0.3) == 3
    assert largest(gradient.abs(), 3).tolist() == [1, 3, 7]
    assert largest(gradient.abs(), 3, forbidden=torch.tensor([1, 7])).tolist() == [0, 3, 6]
    assert largest(-gradient.abs(), 3).tolist() == [2, 4, 5]
    assert largest(gradient.abs(), 9).tolist() == list(range(9))
    assert largest(gradient.abs(), 9, forbidden=torch.tensor([4])).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [quota(1000, rate) for rate in (1e-9, 0.05, 0.9999, 1)] == [1, 51, 1000, 1000]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_they_are_those_of_the_summed_gradient(project: Project, tmp_path: Path, method: Any) -> None:
    """Computed here from the loss on the batches one by one, in another way than by hooks and topk."""
    argv = (project.argv if method == "sft" else project.dpo_argv)(tmp_path, *FULL, *ONE_STEP)
    trainer: Any = trained([*argv, "--sift_rate", "0.05", "--sift_select_steps", "3"], method)
    fresh: Any = build(argv, method=method).trainer
    order = torch.randperm(len(fresh.train_dataset), generator=torch.Generator().manual_seed(fresh.args.seed)).tolist()
    sums: dict[str, Tensor] = {}
    for start in (0, 4, 8):
        rows = [fresh.train_dataset[row] for row in order[start : start + 4]]
        fresh.model.train().zero_grad()
        fresh.compute_loss(fresh.model, fresh._prepare_inputs(fresh.data_collator(rows))).backward()
        for name, parameter in fresh.model.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.grad.cpu()
    for name, index_N in sift_of(trainer).entries.items():
        size = sums[name].abs().flatten()
        is_chosen = torch.zeros(len(size), dtype=torch.bool).index_fill(0, index_N, True)
        assert is_chosen.sum() == int(0.05 * len(size)) + 1
        assert size[is_chosen].min() >= size[~is_chosen].max() * (1 - 1e-4)


# What they do


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_no_more_than_the_quota_changes_and_the_rest_keeps_its_bits(
    project: Project, tmp_path: Path, optim: str
) -> None:
    rate = 0.034
    metrics = align.main("sft", project.argv(tmp_path, *FULL, "--optim", optim, "--sift_rate", str(rate)))
    before, after = base_of(project).state_dict(), load_file(tmp_path / "model.safetensors")
    n_changed = n_allowed = 0
    for name, value in after.items():
        changed = int((value != before[name]).sum())
        assert changed <= quota(value.numel(), rate), name
        n_changed, n_allowed = n_changed + changed, n_allowed + quota(value.numel(), rate)
    assert n_changed > 0.9 * n_allowed
    assert metrics["sift"]["trained_entries"] == metrics["cost"]["trainable_parameters"] == n_allowed
    assert metrics["sift"]["share"] == pytest.approx(rate, abs=0.002)
    assert metrics["trained"]["held_out_loss"] < metrics["base"]["held_out_loss"]
    card = (tmp_path / "README.md").read_text()
    assert "| sift_rate | `0.034` |" in card
    assert f"| trained entries | `{n_allowed:,} of " in card


def test_the_base_with_the_delta_is_the_saved_model(project: Project, tmp_path: Path) -> None:
    more = ["--sift_rate", "0.1", "--ema_half_life", "2", "--save_strategy", "no"]
    align.main("sft", project.argv(tmp_path, *FULL, *more))
    path, model = tmp_path / "sparse_delta.safetensors", base_of(project)
    saved = load_file(tmp_path / "model.safetensors")
    assert not all(torch.equal(model.state_dict()[name], value) for name, value in saved.items())
    apply_delta(model, path)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in saved.items())
    assert path.stat().st_size < 0.25 * (tmp_path / "model.safetensors").stat().st_size
    before = base_of(project)
    with pytest.raises(InputError, match="cannot read"):
        apply_delta(before, tmp_path / "none")
    name = next(name for name in load_file(path) if name.endswith("embed_tokens.weight.indices"))
    for change, said in (
        (lambda tensors: tensors[name][-1:].fill_(10**6), "of another model: it has entries of"),
        (lambda tensors: tensors[name][-1:].fill_(-1), "of another model: it has entries of"),
        (lambda tensors: tensors.update({name: tensors[name][:-1].clone()}), "do not fit"),
        (lambda tensors: tensors.pop(name), "it has other tensors than indices and values"),
    ):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, tmp_path / "changed.safetensors")
        with pytest.raises(InputError, match=said):
            apply_delta(before, tmp_path / "changed.safetensors")
    assert distance(before.state_dict(), base_of(project).state_dict()) == 0


def test_rate_1_is_full_fine_tuning_bit_for_bit(project: Project, tmp_path: Path) -> None:
    argv = project.argv(tmp_path, *FULL, "--max_steps", "3", "--save_strategy", "no", "--logging_steps", "1")
    plain, whole, half = (trained([*argv, *more]) for more in ([], ["--sift_rate", "1"], ["--sift_rate", "0.5"]))
    assert distance(plain.model.state_dict(), whole.model.state_dict()) == 0
    assert distance(plain.model.state_dict(), half.model.state_dict()) > 1e-4

    def logged(trainer: Any) -> list[dict[str, float]]:
        return [
            {k: v for k, v in row.items() if "runtime" not in k and "per_s" not in k}
            for row in trainer.state.log_history
        ]

    assert logged(plain) == logged(whole), "choosing leaves no trace in the logs"


def test_the_optimizer_sees_nothing_of_the_others(project: Project, tmp_path: Path) -> None:
    trainer = trained(project.argv(tmp_path, *FULL, *ONE_STEP, "--sift_rate", "0.1"))
    entries = sift_of(trainer).entries
    for name, parameter in trainer.model.named_parameters():
        moment = trainer.optimizer.state[parameter]["exp_avg_sq"].flatten()
        assert moment[entries[name].to(moment.device)].any()
        assert not moment.index_fill(0, entries[name].to(moment.device), 0).any()


def test_controls_learn_slower(project: Project, tmp_path: Path) -> None:
    losses = {}
    for entries in ("largest", "random", "smallest"):
        options = ["--learning_rate", "0.005", "--sift_rate", "0.02", "--sift_entries", entries]
        argv = project.argv(tmp_path / entries, "--use_peft", "false", *options, "--save_strategy", "no")
        trainer = trained([*argv, "--max_steps", "12"])
        losses[entries] = trainer.evaluate()["eval_loss"]
    assert losses["largest"] + 0.05 < losses["random"] < losses["smallest"]


def test_random_entries_depend_on_the_seed_alone(project: Project, tmp_path: Path) -> None:
    chosen = []
    for seed, rate in (("3", "0.01"), ("3", "0.001"), ("4", "0.01")):
        more = ["--sift_rate", "0.05", "--sift_entries", "random", "--seed", seed, "--learning_rate", rate]
        chosen.append(sift_of(trained(project.argv(tmp_path, *FULL, *ONE_STEP, *more))).entries)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(chosen[0][name], chosen[1][name])
    assert not torch.equal(chosen[0][name], chosen[2][name])


def test_only_some_modules(project: Project, tmp_path: Path) -> None:
    more = ["--sift_rate", "0.5", "--sift_modules", "q_proj", "down_proj"]
    trainer = trained(project.argv(tmp_path, *FULL, *ONE_STEP, *more))
    before = base_of(project).state_dict()
    for name, value in trainer.model.state_dict().items():
        is_one = "q_proj" in name or "down_proj" in name
        assert (value.cpu() != before[name]).any().item() == is_one
    assert sift_of(trainer).report()["sift"]["share"] < 0.2
    with pytest.raises(InputError, match="sift_modules has q_prj, which no module of the model is called"):
        build(project.argv(tmp_path, *FULL, "--sift_rate", "0.5", "--sift_modules", "q_prj", "k_proj"))


# The guard


def test_entries_that_matter_for_safety_are_not_chosen(project: Project, tmp_path: Path) -> None:
    safety = ["--sift_safety_dataset_name", str(project.folder / "safety.jsonl"), "--sift_forbidden", "0.3"]
    argv = project.argv(tmp_path, *FULL, *ONE_STEP, "--sift_rate", "0.1")
    plain, guarded = trained(argv), trained([*argv, *safety])
    callback = sift_of(guarded)
    state = {name: value.clone() for name, value in guarded.model.state_dict().items()}
    guarded.model.load_state_dict(base_of(project).state_dict())
    fisher = callback._fisher()
    assert fisher is not None
    overlaps = []
    for name, index_N in callback.entries.items():
        n = fisher[name].numel()
        forbidden = set(fisher[name].flatten().topk(int(0.3 * n)).indices.tolist())
        assert not forbidden & set(index_N.tolist())
        assert len(index_N) == quota(n, 0.1)
        overlaps.append(len(forbidden & set(sift_of(plain).entries[name].tolist())) / len(index_N))
    assert max(overlaps) > 0.3, "the control: without the guard they are chosen"
    assert distance(state, plain.model.state_dict()) > 0


# Runs


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_resumed_run_is_the_same(project: Project, tmp_path: Path, method: Any) -> None:
    argv = project.argv if method == "sft" else project.dpo_argv
    options = [*FULL, "--sift_rate", "0.05", "--ema_half_life", "2"]
    align.main(method, argv(tmp_path / "whole", *options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    metrics = align.main(method, argv(tmp_path / "broken", *options, "--resume_from_checkpoint", "true"))
    for file in ("model.safetensors", "sparse_delta.safetensors", "checkpoint-6/sift.safetensors"):
        whole, broken = (load_file(tmp_path / name / file) for name in ("whole", "broken"))
        assert distance({k: v.double() for k, v in whole.items()}, {k: v.double() for k, v in broken.items()}) == 0
    assert metrics["sift"]["trained_entries"] > 0
    with pytest.raises(InputError, match=r"different: sift_rate \(0.05, now 0.06\)"):
        align.main(method, argv(tmp_path / "broken", *options, "--sift_rate", "0.06"))


def test_a_checkpoint_without_the_entries(project: Project, tmp_path: Path) -> None:
    argv = project.argv(tmp_path, *FULL, "--sift_rate", "0.05", "--max_steps", "2")
    trainer: Any = trained(argv)
    path = tmp_path / "checkpoint-2" / "sift.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    whole = path.read_bytes()
    for content, said in ((whole, "is of other weights"), (whole[:-9], "is damaged"), (None, "there is no")):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(InputError, match=said):
            trainer.train(resume_from_checkpoint=str(path.parent))


RATE = ["--sift_rate", "0.1"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sift_rate", "0"], r"sift_rate is 0.0, but it is a share"),
        (["--sift_rate", "1.5"], r"sift_rate is 1.5, but it is a share"),
        (["--sift_entries", "random"], "sift_entries is given without sift_rate"),
        ([*RATE, "--sift_entries", "biggest"], "which is not one of: largest, smallest, random"),
        ([*RATE, "--sift_select_steps", "0"], "sift_select_steps is 0; choose 1 or more"),
        ([*RATE, "--use_peft", "true"], "add --use_peft false"),
        ([*RATE, "--freeze_units", "x"], "sift_rate and freeze_units both choose"),
        ([*RATE, "--sift_forbidden", "0.2"], "sift_forbidden is given without sift_safety_dataset_name"),
        ([*RATE, "--sift_safety_dataset_name", "x", "--sift_forbidden", "1"], "choose a value in "),
        (
            ["--sift_rate", "0.8", "--sift_safety_dataset_name", "x", "--sift_forbidden", "0.3"],
            "leaves too few entries",
        ),
    ],
)
def test_what_is_refused(project: Project, tmp_path: Path, options: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        align.main("sft", project.argv(tmp_path / "run", *FULL, *options))
    assert not (tmp_path / "run").exists()


def test_safety_data_without_refusals(project: Project, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "how do i break the lock"}\n')
    with pytest.raises(InputError, match="have no responses; give a dataset that has some with --sift_safety_dataset"):
        build(project.argv(tmp_path / "run", *FULL, *RATE, "--sift_safety_dataset_name", str(path)))
