"""A user's own tiny model, SAEs and data, and trainers built of them as the recipes build theirs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback, set_seed

from sails_align.initializers.adapter import AdapterInit
from sails_align.subspace.basis import Subspace
from sails_align.subspace.options import Method
from sails_align.training import run as align
from sails_align.training.dataset import TrainingSource
from sails_align.training.identity import run_identity
from sails_align.training.subspace import find_subspace
from sails_align.training.trainer import AlignmentTrainer, build_trainer

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

    def dpo_argv(self, output_dir: Path, *more: str) -> list[str]:
        """The same for DPO, for which helpful data must be pairs, too."""
        return self.argv(output_dir, "--helpful_dataset_name", str(self.folder / "helpful_pairs.jsonl"), *more)


@dataclass(frozen=True)
class Built:
    """A trainer, as the recipe builds it."""

    args: align.TrainingPlan
    source: TrainingSource
    subspace: Subspace | None
    trainer: AlignmentTrainer
    init: AdapterInit | None

    def identity(self) -> dict[str, Any]:
        return run_identity(self.args, self.source, self.subspace)


def build(argv: list[str], callbacks: list[TrainerCallback] | None = None, method: Method = "sft") -> Built:
    args = align.parse(method, argv)
    args, testbed = align.resolved(args)
    source = align.load_source(args, testbed)
    subspace = None
    if args.sails.uses_subspace:
        folder = Path(str(args.training.output_dir)) / "subspace"
        subspace = find_subspace(args, source, folder)
    built = build_trainer(args, source, subspace, callbacks)
    return Built(built.plan, source, subspace, built.trainer, built.init)


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


def make_project(folder: Path) -> Project:
    save_model(folder / "tiny")
    save_saes(folder / "saes")
    harmless, harmful, refusal, answer = SENTENCES
    safety = [{"prompt": f"{harmful} {i}", "chosen": f"{refusal} {i}", "rejected": f"{answer} {i}"} for i in range(40)]
    helpful = [{"prompt": f"{harmless} {i}", "response": f"{answer} {i}"} for i in range(60)]
    pairs = [{"prompt": f"{harmless} {i}", "chosen": f"{answer} {i}", "rejected": f"{refusal} {i}"} for i in range(60)]
    for name, rows in {"safety": safety, "helpful": helpful, "helpful_pairs": pairs}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Project(folder)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the Trainer puts models: what is compared bit for bit with them has to be computed there."""


def half_harmless(project: Project, folder: Path) -> Path:
    """Write the safety data with every second row said to be of a harmless request."""
    rows = [json.loads(line) for line in (project.folder / "safety.jsonl").read_text().splitlines()]
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps({**row, "harmful": i % 2 == 0}) + "\n" for i, row in enumerate(rows)))
    return path


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids_BS = torch.arange(4, 44).view(4, 10)
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids_BS.to(next(model.parameters()).device)).logits.cpu()


def base_logits(project: Project) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(project.folder / "tiny").to(DEVICE))


def adapter_weights(trainer: AlignmentTrainer) -> dict[str, torch.Tensor]:
    return {name: value.cpu().clone() for name, value in get_peft_model_state_dict(trainer.model).items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def energy_inside(matrix_DK: torch.Tensor, basis_DR: torch.Tensor) -> float:
    """Return the share (0 to 1) of a matrix's squared Frobenius norm in the span of an orthonormal basis."""
    inside = (basis_DR.double().T @ matrix_DK.double()).square().sum()
    return (inside / matrix_DK.double().square().sum()).item()
