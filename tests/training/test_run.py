"""The stages of a training on a tiny model: what starts it, what is skipped, what is resumed and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl import SFTTrainer

from sails_align import align
from sails_align.errors import InputError
from sails_align.subspace.adapter import AdapterInit
from sails_align.subspace.basis import Subspace
from sails_align.training import subspaces
from sails_align.training.run import build_sft_trainer, find_checkpoint, run_identity, train
from sails_align.training.source import Source

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "sft_sails.py"
D_MODEL, N_LAYERS, RANK, SAE_LAYERS = 32, 3, 4, (0, 1)
SENTENCES = (
    "how do i mend the cup",
    "how do i break the lock",
    "sorry no that would hurt someone",
    "you can with glue",
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} {{ eos_token }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
INITS = ("default", "random_basis", "random_features", "activation_pca", "mean_diff", "sails")


@dataclass(frozen=True)
class Project:
    """A user's own model, SAEs and data."""

    folder: Path

    def argv(self, output_dir: Path, *more: str) -> list[str]:
        """A short training; later options go before earlier ones."""
        files = {name: self.folder / f"{name}.jsonl" for name in ("safety", "helpful")}
        options: dict[str, Any] = {
            "model_name_or_path": self.folder / "tiny",
            "dataset_name": files["safety"],
            "helpful_dataset_name": files["helpful"],
            "output_dir": output_dir,
            "top_k": 8,
            "lora_r": RANK,
            "learning_rate": 0.01,
            "per_device_train_batch_size": 4,
            "max_length": 32,
            "max_steps": 6,
            "save_steps": 2,
            "eval_examples": 4,
            "gradient_checkpointing": "false",
            "disable_tqdm": "true",
        }
        if "--subspace_path" not in more:
            options["sae_path"] = self.folder / "saes"
        return [word for name, value in options.items() for word in (f"--{name}", str(value))] + list(more)


@dataclass(frozen=True)
class Built:
    """A trainer, as the recipe builds it."""

    args: align.Arguments
    source: Source
    subspace: Subspace | None
    trainer: SFTTrainer
    init: AdapterInit | None

    def identity(self) -> dict[str, Any]:
        return run_identity(self.args.sails, self.args.training, self.args.model, self.source, self.subspace)


def build(argv: list[str], callbacks: list[TrainerCallback] | None = None) -> Built:
    args = align.parse("sft", argv)
    source, _ = align.load_source(args)
    subspace = None
    if args.sails.init != "default":
        folder = Path(str(args.training.output_dir)) / "subspace"
        subspace = subspaces.find_subspace(args.sails, source, align.discovery_options(args), folder)
    trainer, init = build_sft_trainer(args.sails, args.training, args.model, source, subspace, callbacks)
    return Built(args, source, subspace, trainer, init)


def save_model(folder: Path) -> None:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*special, "<user>", "<assistant>", *" ".join(SENTENCES).split(), *map(str, range(60))]
    words = list(dict.fromkeys(words))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **named).save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def save_saes(folder: Path) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    for layer in SAE_LAYERS:
        set_seed(layer)
        metadata = SAEMetadata(model_name="tiny", hook_name=f"blocks.{layer}.hook_resid_post")
        StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=64, metadata=metadata)).save_model(folder / f"layer_{layer}")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("project")
    save_model(folder / "tiny")
    save_saes(folder / "saes")
    harmless, harmful, refusal, answer = SENTENCES
    safety = [{"prompt": f"{harmful} {i}", "chosen": f"{refusal} {i}", "rejected": f"{answer} {i}"} for i in range(40)]
    helpful = [{"prompt": f"{harmless} {i}", "response": f"{answer} {i}"} for i in range(60)]
    for name, rows in {"safety": safety, "helpful": helpful}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield Project(folder)


@pytest.fixture(scope="module")
def finished(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory; do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    align.main("sft", project.argv(folder))
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids_BS = torch.arange(4, 44).view(4, 10)
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids_BS).logits


def base_logits(project: Project) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(project.folder / "tiny"))


def adapter_weights(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in get_peft_model_state_dict(trainer.model).items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# What training starts from


@pytest.mark.parametrize("init", INITS)
def test_starts_as_the_base_model_and_learns(project: Project, tmp_path: Path, init: str) -> None:
    built = build(project.argv(tmp_path, "--init", init))
    expected = base_logits(project)
    assert torch.equal(logits(built.trainer.model), expected)
    assert (built.init is None) == (built.subspace is None) == (init == "default")
    built.trainer.train()
    assert not torch.allclose(logits(built.trainer.model), expected, atol=1e-3)
    with built.trainer.model.disable_adapter():
        assert torch.equal(logits(built.trainer.model), expected)


def test_plain_lora_is_pefts_own(project: Project, tmp_path: Path) -> None:
    weights = adapter_weights(build(project.argv(tmp_path, "--init", "default")).trainer)
    for name, value in weights.items():
        if "lora_B" in name:
            assert not value.any()
        else:  # Kaiming's bound with a = sqrt(5)
            assert 0.5 < value.abs().max() * value.shape[1] ** 0.5 <= 1
    other = adapter_weights(build(project.argv(tmp_path, "--init", "default", "--seed", "1")).trainer)
    assert distance(weights, other) > 0.01


def test_the_directions_are_where_they_belong(project: Project, tmp_path: Path) -> None:
    built = build(project.argv(tmp_path))
    assert built.subspace is not None
    weights = adapter_weights(built.trainer)
    for module, layer in {"layers.1.self_attn.q_proj": 0, "layers.2.self_attn.v_proj": 1}.items():
        basis_DR = built.subspace.bases[layer][:, :RANK]
        factor_RD = weights[f"base_model.model.model.{module}.lora_A.weight"]
        torch.testing.assert_close(factor_RD[: basis_DR.shape[1]], basis_DR.T)
    basis_DR = built.subspace.bases[1][:, :RANK]
    factor_DR = weights["base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"]
    torch.testing.assert_close(factor_DR[:, : basis_DR.shape[1]], basis_DR)


def test_sae_only_leaves_other_layers_without_adapter(project: Project, tmp_path: Path) -> None:
    weights = adapter_weights(build(project.argv(tmp_path, "--layer_map", "sae_only")).trainer)
    modules = {name.removeprefix("base_model.model.model.layers.").rpartition(".lora")[0] for name in weights}
    readers = {f"{layer + 1}.self_attn.{name}" for layer in SAE_LAYERS for name in ("q_proj", "k_proj", "v_proj")}
    assert modules == readers | {f"{layer}.self_attn.o_proj" for layer in SAE_LAYERS}


@pytest.mark.parametrize("mode", ["init", "freeze", "decay"])
def test_subspace_modes(project: Project, tmp_path: Path, mode: str) -> None:
    strength = ["--subspace_decay", "100"] if mode == "decay" else []  # times the rate, 0.01: all the way back
    argv = project.argv(tmp_path, "--subspace_mode", mode, *strength, "--lr_scheduler_type", "constant")
    built = build([*argv, "--warmup_steps", "0"])
    assert built.init is not None
    align.measure(built.trainer, built.source, None, built.args, base=True)  # PEFT unfreezes what it disables
    before = adapter_weights(built.trainer)
    built.trainer.train()
    after = adapter_weights(built.trainer)
    sides = {f"{module.name}.lora_{module.side}.weight" for module in built.init.modules}
    assert sides < before.keys()
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert all(moved[name] > 1e-3 for name in moved.keys() - sides)
    assert all(moved[name] == 0 if mode == "freeze" else moved[name] < 1e-6 for name in sides) == (mode != "init")


# What is not done twice


def test_discovery_is_skipped_on_the_same_inputs(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    discover = subspaces.discover

    def recorded(*args: Any, **kwargs: Any) -> None:
        found.append("again")
        discover(*args, **kwargs)

    monkeypatch.setattr(subspaces, "discover", recorded)
    folder = tmp_path / "subspace"

    def find(*more: str) -> Subspace:
        args = align.parse("sft", project.argv(tmp_path, *more))
        source, _ = align.load_source(args)
        return subspaces.find_subspace(args.sails, source, align.discovery_options(args), folder)

    first = find()
    assert found == ["again"]
    written = (folder / "subspace.safetensors").stat().st_mtime_ns
    assert distance(find().bases, first.bases) == 0  # pyright: ignore[reportArgumentType]
    find("--learning_rate", "0.5", "--fold_norm", "true")  # nothing that discovery depends on
    assert found == ["again"]
    assert (folder / "subspace.safetensors").stat().st_mtime_ns == written
    changes = (["--top_k", "4"], ["--contrast", "response"], ["--max_train_examples", "20"], ["--max_length", "30"])
    for n, change in enumerate(changes, 2):
        find(*change)
        assert len(found) == n, change
    model = Path(shutil.copytree(project.folder / "tiny", tmp_path / "tiny"))
    weights = load_file(model / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"})
    find("--model_name_or_path", str(model))
    assert len(found) == len(changes) + 2
    find()
    assert len(found) == len(changes) + 3


def test_no_helpful_data_no_prompt_contrast(project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    argv = project.argv(tmp_path)
    at = argv.index("--helpful_dataset_name")
    del argv[at : at + 2]
    built = build(argv)
    assert built.subspace is not None
    assert built.subspace.provenance["features"]["contrast"] == "response"
    assert built.subspace.provenance["options"]["contrast"] == "response"
    assert "--contrast response" in caplog.text
    with pytest.raises(InputError, match="helpful_dataset_name"):
        build([*argv, "--contrast", "both"])


# What is left out


def test_examples_that_do_not_fit_are_counted(
    project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"prompt": "how do i break " + "the lock " * 20, "chosen": "sorry no", "rejected": "you can"}
    rows = (project.folder / "safety.jsonl").read_text() + 10 * (json.dumps(long) + "\n")
    (tmp_path / "long.jsonl").write_text(rows)
    metrics = align.main("sft", project.argv(tmp_path / "run", "--dataset_name", str(tmp_path / "long.jsonl")))
    n_left_out = metrics["provenance"]["longer_than_max_length"]
    assert n_left_out["training"] + n_left_out["held-out"] == 10
    assert f"of {n_left_out['training']} of 92 training examples fill max_length 32" in caplog.text
    with pytest.raises(InputError, match="fill max_length 6: no response is left"):
        build(project.argv(tmp_path / "none", "--init", "random_basis", "--max_length", "6"))


def test_a_diverged_training_says_so(project: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nan: training diverged; choose a smaller --learning_rate"):
        align.main("sft", project.argv(tmp_path, "--init", "random_basis", "--learning_rate", "1e30"))
    assert not (tmp_path / "metrics.json").exists()


# What is resumed


class AtStart(TrainerCallback):
    """The adapter as it is when training begins, after a checkpoint has been loaded."""

    weights: dict[str, torch.Tensor] | None = None
    step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self.weights, self.step = dict(get_peft_model_state_dict(model)), state.global_step
        self.weights = {name: value.clone() for name, value in self.weights.items()}


@pytest.mark.parametrize("mode", ["init", "freeze"])
def test_a_checkpoint_is_not_initialised_again(project: Project, tmp_path: Path, mode: str) -> None:
    argv = project.argv(tmp_path / "run", "--subspace_mode", mode, "--lora_dropout", "0.1", "--save_total_limit", "9")
    align.main("sft", argv)
    whole = load_file(tmp_path / "run" / "adapter_model.safetensors")
    at_start = AtStart()
    resumed = build([*argv, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-4")], [at_start])
    initial = adapter_weights(resumed.trainer)
    train(resumed.trainer, find_checkpoint(resumed.args.training, resumed.identity()))
    saved = load_file(tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors")
    assert at_start.step == 4
    assert at_start.weights is not None
    assert distance(at_start.weights, saved) == 0
    assert distance(saved, initial) > 1e-3
    assert distance(adapter_weights(resumed.trainer), whole) < 1e-6


def kill(argv: list[str], ready: Callable[[], bool]) -> None:
    """Start the recipe in a process of its own, and kill it when something has happened."""
    process = subprocess.Popen([sys.executable, str(RECIPE), *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 100
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, stderr.decode()


@pytest.mark.parametrize("moment", ["between checkpoints", "while one is written"])
def test_killed_and_resumed_is_as_uninterrupted(project: Project, finished: Path, tmp_path: Path, moment: str) -> None:
    common = ["--subspace_path", str(finished / "subspace"), "--lora_dropout", "0.1"]
    common += ["--max_steps", "60", "--save_steps", "7", "--logging_steps", "5"]
    align.main("sft", project.argv(tmp_path / "whole", *common))
    run = tmp_path / "killed"
    argv = project.argv(run, *common)
    third = run / "checkpoint-21"
    if moment == "between checkpoints":
        kill(argv, (third / "run.json").exists)
    else:
        kill(argv, third.exists)
        (third / "run.json").unlink(missing_ok=True)  # had it been quicker than we
        (third / "adapter_model.safetensors").write_bytes(b"half")
    assert not (run / "adapter_model.safetensors").exists()
    align.main("sft", [*argv, "--resume_from_checkpoint", "true"])
    files = [load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "whole")]
    assert distance(*files) < 1e-6
    losses = [json.loads((folder / "metrics.json").read_text())["trained"] for folder in (run, tmp_path / "whole")]
    assert losses[0]["held_out_loss"] == pytest.approx(losses[1]["held_out_loss"], abs=1e-6)
    history = json.loads((run / "checkpoint-56" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == list(range(5, 56, 5))  # none twice, none left out


def test_a_finished_run_stays_as_it_is(project: Project, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    metrics = align.main("sft", project.argv(run, "--resume_from_checkpoint", "true"))
    files = [load_file(folder / "adapter_model.safetensors") for folder in (run, finished)]
    assert distance(*files) == 0
    assert metrics["trained"] == json.loads((finished / "metrics.json").read_text())["trained"]


def test_nothing_to_resume_is_a_fresh_start(project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    argv = project.argv(tmp_path / "run", "--init", "random_basis")
    resumed = build([*argv, "--resume_from_checkpoint", "true"])
    assert find_checkpoint(resumed.args.training, resumed.identity()) is None
    assert "no checkpoint yet" in caplog.text
    assert find_checkpoint(build(argv).args.training, {}) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--learning_rate", "0.02"], "learning_rate"),
        (["--lora_r", "2", "--seed", "3"], "subspace, lora_r, seed"),
        (["--helpful_ratio", "0.5"], "data"),
        (["--subspace_mode", "freeze"], "subspace_mode"),
    ],
)
def test_a_checkpoint_of_another_run(
    project: Project, finished: Path, tmp_path: Path, change: list[str], named: str
) -> None:
    other = build(project.argv(tmp_path, *change, "--resume_from_checkpoint", str(finished / "checkpoint-6")))
    with pytest.raises(InputError, match="is of another run") as refused:
        find_checkpoint(other.args.training, other.identity())
    differing = str(refused.value).partition("(different: ")[2].partition(")")[0].split(", ")
    assert set(named.split(", ")) <= set(differing)
    assert not set(differing) & {"model", "init", "lora_target_modules", "max_length"}
    same = build(project.argv(tmp_path / "same", "--resume_from_checkpoint", str(finished / "checkpoint-6")))
    assert find_checkpoint(same.args.training, same.identity()) == str(finished / "checkpoint-6")


# What is left behind


def test_the_run_directory(project: Project, finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "run.json", "metrics.json", "subspace"} <= names
    assert {"checkpoint-4", "checkpoint-6"} <= names
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["base"].keys() == metrics["trained"].keys() == {"held_out_loss"}
    assert metrics["trained"]["held_out_loss"] < metrics["base"]["held_out_loss"]
    run = json.loads((finished / "run.json").read_text())
    assert run["identity"] == metrics["provenance"]["identity"]
    assert run["options"]["sails"]["top_k"] == 8
    subspace = Subspace.load(finished / "subspace")
    assert list(subspace.bases) == list(SAE_LAYERS)
    assert metrics["provenance"]["saes"].keys() == {"0", "1"}
