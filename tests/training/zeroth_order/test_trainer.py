"""Trainings without gradients: their steps, batches, privacy, and that a resumed one is the same."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import beta
from tiny import Project, adapter_weights, base_logits, build, distance, logits
from transformers import TrainerCallback, TrainerState

from sails_align.core.errors import InputError
from sails_align.initializers import INITIALIZERS
from sails_align.training import run as align
from sails_align.training.zeroth_order.accounting import spent_epsilon
from sails_align.training.zeroth_order.batches import PrivateBatches
from sails_align.training.zeroth_order.estimate import directions, noisy_sum
from sails_align.training.zeroth_order.randomness import Secret, torch_generator

ZO = ["--init", "default", "--zeroth_order", "true", "--warmup_steps", "0", "--lr_scheduler_type", "constant"]
PRIVATE = [*ZO, "--dp_delta", "0.001"]
NO_FILES = ["--save_strategy", "no"]


def trained(argv: list[str]) -> Any:
    trainer: Any = build(argv).trainer
    trainer.train()
    return trainer


# Steps


def test_losses_are_means_over_the_tokens_of_each_example(project: Project, tmp_path: Path) -> None:
    trainer: Any = build(project.argv(tmp_path, *ZO)).trainer
    rows = [trainer.train_dataset[i] for i in range(10)]
    rows[3] = {name: of[:-2] if isinstance(of, list) else of for name, of in rows[3].items()}
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    found = trainer.zeroth_order.losses(batch)
    for row, loss in zip(rows, found.tolist(), strict=True):
        one = trainer._prepare_inputs(trainer.data_collator([row]))
        with torch.no_grad():
            exact = trainer.model.eval()(**{**one, "use_cache": False}).loss.item()
        assert loss == pytest.approx(exact, rel=1e-5)


class Recorder(TrainerCallback):
    """What the optimizer is given, and what it makes of the parameters."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.before = [parameter.detach().clone() for parameter in self.parameters]
        self.estimates = [parameter.grad.clone() for parameter in self.parameters]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after = [parameter.detach().clone() for parameter in self.parameters]


def test_a_step_is_the_slope_along_its_direction(project: Project, tmp_path: Path) -> None:
    """Against autograd: with a small eps, the slope of the mean loss along z is the gradient's product with z."""
    argv = project.argv(tmp_path, *ZO, *NO_FILES, "--max_steps", "1", "--learning_rate", "0.01")
    recorder = Recorder()
    trainer: Any = build([*argv, "--zo_directions", "2"], [recorder]).trainer
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(9)]))
    logits_BSV = trainer.model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels_BS = batch["labels"][:, 1:]
    picked_BS = -logits_BSV.log_softmax(-1)[:, :-1].gather(-1, labels_BS.clamp(min=0)[..., None])[..., 0]
    is_learned_BS = labels_BS != -100
    loss = ((picked_BS * is_learned_BS).sum(1) / is_learned_BS.sum(1)).mean()
    gradients = torch.autograd.grad(loss, parameters)
    wanted = [torch.zeros_like(p) for p in parameters]
    for k in range(2):
        z = directions(parameters, torch_generator("direction", trainer.args.seed, 0, k))
        slope = sum((g * each).sum() for g, each in zip(gradients, z, strict=True))
        for total, each in zip(wanted, z, strict=True):
            total.add_(each, alpha=float(slope) / 2)
    assert trainer.zeroth_order.step(batch).item() == pytest.approx(loss.item(), rel=1e-3)
    for parameter, at_start, estimate in zip(parameters, start, wanted, strict=True):
        assert torch.equal(parameter, at_start)
        torch.testing.assert_close(parameter.grad, estimate, rtol=0.03, atol=0.03)
    trainer.train()
    for before, estimate, after in zip(recorder.before, recorder.estimates, recorder.after, strict=True):
        torch.testing.assert_close(after, before - 0.01 * estimate, rtol=0, atol=1e-7)


@pytest.mark.parametrize("init", [["--init", "default"], ["--subspace_mode", "freeze"]], ids=["lora", "sails frozen"])
def test_it_learns_and_leaves_the_base_alone(project: Project, tmp_path: Path, init: list[str]) -> None:
    more = ["--max_steps", "20", "--learning_rate", "0.01", "--zo_directions", "10", *NO_FILES]
    more += ["--per_device_train_batch_size", "32"]
    metrics = align.main("sft", project.argv(tmp_path, *ZO, *init, *more))
    assert metrics["trained"]["held_out_loss"] < metrics["base"]["held_out_loss"] - 0.02
    assert "privacy" not in metrics
    assert "| zeroth_order | `True` |" in (tmp_path / "README.md").read_text()
    assert distance(adapter_of(tmp_path), {name: 0 * of for name, of in adapter_of(tmp_path).items()}) > 0


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_without_noise_and_clipping_a_private_training_is_mezo(project: Project, tmp_path: Path) -> None:
    argv = project.argv(tmp_path, *ZO, *NO_FILES, "--per_device_train_batch_size", "200", "--max_steps", "3")
    no_noise = ["--dp_sigma", "0"]
    mezo, infinite, free, clipped = (
        adapter_weights(trained([*argv, *more]))
        for more in ([], ["--dp_epsilon", "inf"], [*no_noise, "--dp_clip", "1e9"], [*no_noise, "--dp_clip", "0.01"])
    )
    assert distance(mezo, infinite) == 0
    assert distance(mezo, free) < 1e-5
    assert distance(mezo, clipped) > 1e-3


# Batches


def test_poisson_batches() -> None:
    secret = Secret.new(None)
    batches = PrivateBatches(60, 15, secret.rng)
    assert batches.rate == 0.25
    assert len(batches) == 4
    drawn = []
    for epoch in range(500):
        batches.set_epoch(epoch)
        drawn += list(batches)
    sizes, counts = [len(batch) for batch in drawn], np.bincount(np.concatenate(drawn), minlength=60)
    assert np.mean(sizes) == pytest.approx(15, abs=0.5)
    assert np.var(sizes) == pytest.approx(60 * 0.25 * 0.75, rel=0.2), "binomial: a batch of fixed size has none"
    assert np.abs(counts - 500).max() < 6 * math.sqrt(2000 * 0.25 * 0.75)
    batches.set_epoch(3)
    assert list(batches) == drawn[12:16]
    assert list(PrivateBatches(60, 15, Secret.new(None).rng)) != drawn[:4], "another secret"
    assert list(PrivateBatches(5, None, secret.rng)) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("size", ["24", "1"])
def test_training_has_the_batches_that_are_accounted_for(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    """With an expected size of 1, a third of the batches is empty."""
    more = ["--dp_sigma", "2", "--dp_batch_size", size, "--dp_noise_seed", "1", "--max_steps", "9"]
    trainer: Any = build(project.argv(tmp_path, *PRIVATE, *NO_FILES, *more)).trainer
    seen, steps = [], trainer.zeroth_order
    step = steps.step
    monkeypatch.setattr(steps, "step", lambda inputs: seen.append(inputs["input_ids"].tolist()) or step(inputs))
    trainer.train()
    batches, n = steps.batches, len(trainer.train_dataset)
    wanted: list[list[int]] = []
    for epoch in range(9):
        batches.set_epoch(epoch)
        wanted += list(batches)
    rows = trainer.train_dataset["input_ids"]
    for found, indices in zip(seen, wanted[:9], strict=True):
        assert [[token for token in row if token] for row in found] == [[t for t in rows[i] if t] for i in indices]
    assert batches.rate == int(size) / n
    assert (size == "24") == all(seen)
    assert steps.report()["privacy"]["sampling"] == "Poisson"


# Privacy


@pytest.mark.parametrize(
    "more", [[], ["--dp_batch_size", "12"], ["--zo_directions", "3"]], ids=["full", "poisson", "k3"]
)
def test_a_training_spends_the_epsilon_that_is_asked_for(project: Project, tmp_path: Path, more: list[str]) -> None:
    metrics = align.main("sft", project.argv(tmp_path, *PRIVATE, *NO_FILES, "--dp_epsilon", "4", *more))
    spent = metrics["privacy"]
    assert 3.95 < spent["epsilon"] <= 4
    assert spent["steps"] == 6
    n = json.loads((tmp_path / "run.json").read_text())["data"]["train"]["rows"]
    rate = 12 / n if "12" in more else 1.0
    assert spent["sampling_rate"] == pytest.approx(rate)
    k = 3 if "3" in more else 1
    independent = spent_epsilon(spent["noise_multiplier"], 0.001, 6 * k, rate) if rate == 1 else spent["epsilon"]
    assert spent["epsilon"] == pytest.approx(independent, rel=1e-6), "K directions cost K times as many releases"
    card = (tmp_path / "README.md").read_text()
    assert f"| privacy | `epsilon {spent['epsilon']:.4g}, delta 0.001 (one example more or less)` |" in card
    assert "noise seed" not in card


def test_the_noise_of_steps_has_the_deviation_that_is_accounted_for(project: Project, tmp_path: Path) -> None:
    more = ["--dp_sigma", "2", "--dp_clip", "5", "--dp_batch_size", "10"]
    steps = build(project.argv(tmp_path, *PRIVATE, *more)).trainer.zeroth_order  # pyright: ignore[reportAttributeAccessIssue]
    released = np.array(
        [steps._released(torch.tensor([1.0, 100.0]), step, k) for step in range(2000) for k in range(2)]
    )
    assert released.mean() * 10 == pytest.approx(6, abs=0.8)
    assert released.std() * 10 == pytest.approx(2 * 5, rel=0.05)
    assert len(set(released.tolist())) == 4000


def audited(without: np.ndarray, with_one: np.ndarray, delta: float) -> float:
    """A lower bound of epsilon (99.9%), from telling apart what is released without and with one example."""
    n, found = len(without), 0.0
    for threshold in np.quantile(np.concatenate([without, with_one]), np.linspace(0.02, 0.98, 25)):
        n_false, n_true = int((without > threshold).sum()), int((with_one > threshold).sum())
        false_high = beta.ppf(0.9995, n_false + 1, n - n_false)
        true_low = beta.ppf(0.0005, n_true, n - n_true + 1) if n_true else 0.0
        if true_low > delta:
            found = max(found, math.log((true_low - delta) / false_high))
    return found


def without_clip(slope_B: torch.Tensor, clip: float, sigma: float, noise: float) -> float:
    """`noisy_sum` with noise of a wrong deviation: sigma, and not sigma times the clip."""
    return noisy_sum(slope_B, clip, sigma / clip, noise)


@pytest.mark.parametrize("sampling", [[], ["--dp_batch_size", "36"]], ids=["full", "poisson"])
def test_an_audit_of_steps_finds_no_more_than_is_claimed_and_finds_a_wrong_scale(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: list[str]
) -> None:
    """Of one step, with a last example of the largest slope and others of none; batches are those of the training."""
    more = ["--dp_sigma", "1", "--dp_clip", "30", "--dp_delta", "1e-5", "--dp_noise_seed", "0", *sampling]
    trainer: Any = build(project.argv(tmp_path, *ZO, *more)).trainer
    steps, n = trainer.zeroth_order, 8000
    steps.on_step_end(trainer.args, TrainerState(global_step=1), trainer.control)
    claimed, last = steps.report()["privacy"]["epsilon"], steps.batches.n - 1

    def released(slope: float) -> np.ndarray:
        """Of n steps, each with a batch and with noise of its own."""
        first, found = (0 if slope else n), []
        while len(found) < n:
            steps.batches.set_epoch(first + len(found))
            for batch in steps.batches:
                slope_B = torch.tensor([slope] if last in batch else [], dtype=torch.float64)
                found.append(steps._released(slope_B, first + len(found), 0))
        return np.array(found[:n])

    honest = audited(released(0.0), released(1e9), 1e-5)
    monkeypatch.setattr("sails_align.training.zeroth_order.trainer.noisy_sum", without_clip)
    wrong = audited(released(0.0), released(1e9), 1e-5)
    assert 0.7 < honest < claimed, "the audit sees something, and not more than was spent"
    assert wrong > claimed, "noise of deviation sigma, without the clip, is found out"


def test_the_noise_is_secret_unless_it_is_asked_for(project: Project, tmp_path: Path) -> None:
    argv = project.argv(tmp_path, *PRIVATE, *NO_FILES, "--dp_sigma", "5", "--max_steps", "2")
    seeds: list[list[str]] = [[], [], ["--dp_noise_seed", "3"], ["--dp_noise_seed", "3"], ["--dp_noise_seed", "4"]]
    one, other, known, again, another = (adapter_weights(trained([*argv, *seed])) for seed in seeds)
    assert distance(one, other) > 0
    assert distance(known, again) == 0
    assert distance(known, another) > 0
    align.main("sft", [*argv, "--dp_noise_seed", "3"])
    assert "nothing is private" in (tmp_path / "README.md").read_text()


def test_the_secret_is_in_checkpoints_alone(project: Project, tmp_path: Path) -> None:
    align.main("sft", project.argv(tmp_path, *PRIVATE, "--dp_epsilon", "4"))
    file = tmp_path / "checkpoint-6" / "zeroth_order.json"
    assert file.stat().st_mode & 0o077 == 0  # whoever reads it can subtract the noise
    secret = json.loads(file.read_text())["secret"]
    assert len(secret) == 64
    files = [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert {path.name for path in files} == {"zeroth_order.json"}
    assert all("checkpoint-" in path.parent.name for path in files)


# Runs


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--dp_epsilon", "4", "--dp_batch_size", "24"],
        ["--dp_sigma", "1"],
    ],
    ids=["mezo", "poisson", "full"],
)
def test_a_resumed_run_is_the_same(project: Project, tmp_path: Path, more: list[str]) -> None:
    options = [*PRIVATE, *more] if more else ZO
    whole = align.main("sft", project.argv(tmp_path / "whole", *options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    broken = align.main("sft", project.argv(tmp_path / "broken", *options, "--resume_from_checkpoint", "true"))
    assert distance(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "broken")) == 0
    assert whole.get("privacy") == broken.get("privacy")


def test_a_longer_training_needs_other_noise(project: Project, tmp_path: Path) -> None:
    options = [*PRIVATE, "--dp_epsilon", "4"]
    align.main("sft", project.argv(tmp_path, *options, "--max_steps", "4"))
    resume = [*options, "--max_steps", "6", "--resume_from_checkpoint", "true"]
    with pytest.raises(InputError, match="was made for another number of steps"):
        align.main("sft", project.argv(tmp_path, *resume))
    options = [*PRIVATE, "--dp_sigma", "3"]
    run = tmp_path / "sigma"
    short = align.main("sft", project.argv(run, *options, "--max_steps", "4"))
    longer = align.main("sft", project.argv(run, *options, "--max_steps", "6", "--resume_from_checkpoint", "true"))
    assert short["privacy"]["epsilon"] < longer["privacy"]["epsilon"]
    assert longer["privacy"]["steps"] == 6
    path = run / "checkpoint-6" / "zeroth_order.json"
    trainer: Any = build(project.argv(run, *options, "--max_steps", "8")).trainer
    for content, said in (("{}", "lacks it"), ("[1", "is damaged"), (None, "there is no")):
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(InputError, match=f"cannot resume with the same noise.*{said}"):
            trainer.train(resume_from_checkpoint=str(run / "checkpoint-6"))


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("sft", ["--dp_epsilon", "4", "--zeroth_order", "false"], "dp_epsilon is given without zeroth_order"),
        ("dpo", [], "DPO's loss of a pair needs a reference"),
        ("sft", ["--use_peft", "false"], "train an adapter"),
        ("sft", ["--loss", "constrained"], "loss is constrained, but the loss of an example"),
        ("sft", ["--loss_type", "dft"], "loss_type is dft"),
        ("sft", ["--label_smoothing_factor", "0.1"], "label_smoothing_factor is 0.1"),
        ("sft", ["--packing", "true"], "packing is True, but each row must be one example"),
        ("sft", ["--lora_dropout", "0.1"], "lora_dropout is 0.1"),
        ("sft", ["--neftune_noise_alpha", "5"], "neftune_noise_alpha is 5.0"),
        ("sft", ["--optim", "adamw_torch"], "optim is adamw_torch, but it steps along random directions"),
        ("sft", ["--max_grad_norm", "1"], "max_grad_norm is 1.0, but there are no gradients"),
        ("sft", ["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps is 2, but a step is one batch"),
        ("sft", ["--freeze_units", "x"], "freeze_units is x, but there are no gradients"),
        ("sft", ["--zo_eps", "0"], "zo_eps is 0.0; choose a value above 0"),
        ("sft", ["--zo_directions", "0"], "zo_directions is 0; choose 1 or more"),
        ("sft", ["--dp_clip", "3"], "dp_clip is given, but nothing is clipped"),
        ("sft", ["--dp_epsilon", "4", "--dp_sigma", "1"], "one follows from the other"),
        ("sft", ["--dp_epsilon", "-1"], r"dp_epsilon is -1\.0; choose a value above 0"),
        ("sft", ["--dp_epsilon", "4", "--dp_delta", "1"], "dp_delta is 1.0, but it is a probability"),
        ("sft", ["--dp_epsilon", "4", "--init", "sails"], "reads the training data before the private steps"),
        ("sft", ["--dp_epsilon", "4", "--init", "eva"], "--init eva reads the training data"),
        ("sft", ["--dp_epsilon", "4", "--derta_prefix_share", "1"], "makes several examples of a pair"),
        ("sft", ["--dp_epsilon", "4", "--nearest_refusal", "true"], "one row can change the response of others"),
    ],
)
def test_what_is_refused(project: Project, tmp_path: Path, method: Any, options: list[str], said: str) -> None:
    argv = (project.argv if method == "sft" else project.dpo_argv)(tmp_path, *ZO, *options)
    if "--use_peft" in options:
        argv = [word for word in argv if word not in ("--init", "default")]
    with pytest.raises(InputError, match=said):
        align.parse(method, argv)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dp_epsilon", "4", "--dp_delta", "0.5"], "and it must be below 1/"),
        (["--dp_epsilon", "4", "--dp_batch_size", "1000"], "choose at most as many"),
    ],
)
def test_what_does_not_suit_the_data(project: Project, tmp_path: Path, options: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build(project.argv(tmp_path, *PRIVATE, *options))


def test_every_initialization_that_looks_at_data_is_known(project: Project, tmp_path: Path) -> None:
    for name, entry in INITIALIZERS.items():
        if entry.needs_data or entry.makes_subspace:
            with pytest.raises(InputError, match="reads the training data"):
                align.parse("sft", project.argv(tmp_path, *PRIVATE, "--dp_epsilon", "4", "--init", name))
        else:
            align.parse("sft", project.argv(tmp_path, *PRIVATE, "--dp_epsilon", "4", "--init", name))


def test_a_private_adapter_in_a_subspace_that_was_found_before(project: Project, tmp_path: Path) -> None:
    more = ["--zeroth_order", "true", "--dp_epsilon", "4", "--dp_delta", "0.001", *NO_FILES]
    found = build(project.argv(tmp_path / "public")).subspace
    assert found is not None
    options = ["--subspace_path", str(tmp_path / "public" / "subspace"), "--init", "sails", *more]
    trainer = trained(project.argv(tmp_path / "private", *options))
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), base_logits(project))
    assert trainer.zeroth_order.report()["privacy"]["epsilon"] > 3.9
