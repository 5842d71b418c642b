"""The commands `sails train sft`, `sails train dpo` and `sails train rlhf`, also as recipes for `accelerate launch`.

sails train sft                       the testbed
sails train dpo --config FILE.yaml    your own model and data: docs/recipes.md

Options of ours, and names of TRL's, are checked before TRL and torch are imported.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from trl import ModelConfig, ScriptArguments  # of TRL, these two import no torch

from sails_align.core.command_line import CommandLine
from sails_align.core.library_options import LibraryOptions
from sails_align.core.options import OutputOptions
from sails_align.core.registry import Registry
from sails_align.data.transforms import TRANSFORMS
from sails_align.initializers import INITIALIZERS
from sails_align.subspace.options import Method
from sails_align.training.callbacks import CALLBACKS
from sails_align.training.losses import LOSSES
from sails_align.training.options import own_options
from sails_align.training.rlhf.options import DEFAULTS, RlhfOptions

_OF_EVERY_TRAINER = ("trl/trainer/base_config.py", "transformers/training_args.py")
_SHOWN = {
    "model_name_or_path": "A folder, or an id of the Hugging Face Hub. Default: the testbed's base model.",
    "model_revision": "Branch, tag or commit of a model on the hub. Default: main.",
    "dtype": "Type of the weights: float32, bfloat16, float16 or auto. Default: float32.",
    "attn_implementation": "Such as sdpa, eager or flash_attention_2. Default: the model's own.",
    "load_in_4bit": "Quantize the base model to 4 bits (QLoRA). Default: false.",
    "load_in_8bit": "Quantize the base model to 8 bits. Default: false.",
    "dataset_name": "Training data: a hub id, a file or a folder. Default: the testbed's.",
    "dataset_config": "Configuration of --dataset_name.",
    "dataset_train_split": "Split of --dataset_name to train on. Default: train.",
    "dataset_test_split": "Split of --dataset_name to measure the loss on. Default: test.",
    "max_length": "Maximum length of an example in tokens. Default: 1024, on the testbed 64.",
    "use_peft": "Train an adapter; false: all weights. Default: true.",
    "lora_r": "Rank of the adapter. Default: 16, on the testbed 8.",
    "lora_alpha": "The adapter's output is scaled by lora_alpha / lora_r. Default: 32, on the testbed 16.",
    "lora_dropout": "Dropout before the adapter. Default: 0.",
    "lora_target_modules": "Linear modules that get an adapter. Default: q_proj, k_proj, v_proj and o_proj, on the "
    "testbed all.",
    "chat_template_path": "A Jinja file, or human_assistant: the chat template, if the tokenizer has none.",
    "beta": "How strongly the model is kept near the reference. Default: 0.1.",
    "num_train_epochs": "Passes over the training data. Default: 3, on the testbed 4.",
    "max_steps": "Optimizer steps, in place of passes over the data.",
    "warmup_steps": "Steps in which the learning rate rises; below 1: their share. Default: 0.1.",
    "per_device_train_batch_size": "Examples that a device handles at a time. Default: 8, on the testbed 16.",
    "gradient_accumulation_steps": "Batches of each device in an optimizer step. Default: 1.",
    "gradient_checkpointing": "Save memory by computing activations twice. Default: true, on the testbed false.",
    "bf16": "Train in bfloat16. Default: true with a GPU.",
    "use_cpu": "Train on the CPU. Default: true without a GPU.",
    "seed": "Seed of initialization, data and training. Default: 42.",
    "output_dir": "Folder of the run. Default: runs/..., named by method, initialization and model.",
    "logging_steps": "Steps between two log lines. Default: 10.",
    "save_steps": "Steps between two checkpoints. Default: 500, on the testbed 20.",
    "report_to": "Where to log: none, wandb, trackio or tensorboard. Default: none.",
    "push_to_hub": "Push the finished run to the Hugging Face Hub. Default: false.",
}
_SHOWN_SFT = {
    **_SHOWN,
    "learning_rate": "Highest learning rate. Default: 2e-4 for an adapter, 2e-5 for all weights; on the testbed 1e-2 "
    "and 1e-3.",
}
_SHOWN_DPO = {
    **_SHOWN,
    "learning_rate": "Highest learning rate. Default: 1e-5 for an adapter, 1e-6 for all weights; on the testbed 1e-2 "
    "(1e-4 after --adapter_path) and 1e-3.",
}
_OTHERS = {
    "per_device_eval_batch_size": "Examples that a device evaluates at a time. Default: 8, on the testbed 64.",
    "save_total_limit": "Checkpoints that are kept. Default: 2.",
}
"""What `--help-all` says of others whose defaults are ours."""
_SHOWN_RLHF = {
    **{name: _SHOWN[name] for name in ("bf16", "use_cpu", "seed", "report_to")},
    "learning_rate": f"Highest learning rate. Default: {DEFAULTS['learning_rate']}.",
    "beta": "How strongly the model is kept near the reference. Default: 0.",
    "max_steps": f"Optimizer steps. Default: {DEFAULTS['max_steps']}.",
    "per_device_train_batch_size": "Answers that a device handles at a time. Default: "
    f"{DEFAULTS['per_device_train_batch_size']}.",
    "num_generations": f"Answers to a prompt, which are compared. Default: {DEFAULTS['num_generations']}.",
    "max_completion_length": f"Longest answer in tokens. Default: {DEFAULTS['max_completion_length']}.",
    "output_dir": "Folder of the run. Default: runs/rlhf-..., named by the testbed.",
    "logging_steps": f"Steps between two log lines. Default: {DEFAULTS['logging_steps']}.",
    "save_steps": f"Steps between two checkpoints. Default: {DEFAULTS['save_steps']}.",
}
TRAINER_OPTIONS = {
    "sft": LibraryOptions(("trl/trainer/sft_config.py", *_OF_EVERY_TRAINER), _SHOWN_SFT),
    "dpo": LibraryOptions(("trl/trainer/dpo_config.py", *_OF_EVERY_TRAINER), _SHOWN_DPO),
    "rlhf": LibraryOptions(("trl/trainer/grpo_config.py", *_OF_EVERY_TRAINER), _SHOWN_RLHF),
}
"""TRL's options of each trainer, and what `--help` says of those that everybody sets."""


def _names(registry: Registry) -> list[str]:
    """Return the names of the options of a registry's entries."""
    return [option.name for _, entry in registry.items() if entry.options for option in fields(entry.options)]


GROUPS = {
    "model": (
        *("model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_4bit", "load_in_8bit"),
        *("chat_template_path", "ref_model_name_or_path"),
    ),
    "data": (
        *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"),
        *("helpful_dataset_name", "helpful_dataset_config", "helpful_dataset_split"),
        *("max_train_examples", "eval_examples", "on_bad_rows", "max_length"),
        *("prompt_column", "chosen_column", "rejected_column", "label_column", "good_labels", "bad_responses"),
        *("helpful_prompt_column", "helpful_chosen_column", "helpful_label_column"),
        *_names(TRANSFORMS),
    ),
    "SAEs and subspace": (
        *("preset", "sae_release", "sae_ids", "sae_path", "sae_allow_mismatch", "sae_placement", "subspace_path"),
        *("contrast", "prompt_tokens", "score", "top_k", "weighting", "center", "tau", "benign_whitening"),
        "max_discovery_examples",
    ),
    "adapter": (
        *("init", "adapter_path", "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
        *("layer_map", "fold_norm", "init_scale", "subspace_mode", "harmful_prompts"),
        *_names(INITIALIZERS),
        *_names(CALLBACKS),
    ),
    "training": (
        *("learning_rate", "beta", "num_train_epochs", "max_steps", "warmup_steps", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "gradient_checkpointing", "bf16", "use_cpu", "seed"),
        *("loss", *_names(LOSSES)),
    ),
    "output": (
        "output_dir",
        "overwrite_output_dir",
        "logging_steps",
        "measure_steps",
        "measure_prompts",
        "measure_n_prompts",
        "save_steps",
        "report_to",
        "push_to_hub",
    ),
}


def align(argv: Sequence[str], prog: str | None = None) -> dict[str, Any]:
    """Align a model by the method that the first argument names, `sft` or `dpo`. Return what is in `metrics.json`."""
    method: Any = argv[0]
    check_options(method, argv[1:], prog)
    from sails_align.training.run import main

    return main(method, argv[1:], prog)


def rlhf(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Train the testbed's RLHF reference model. Return what is in `metrics.json`."""
    line, library = CommandLine.read(argv), TRAINER_OPTIONS["rlhf"]
    if "--help-all" not in line.options and library.names():
        line.parse([RlhfOptions, OutputOptions], prog=prog, groups={"training": list(_SHOWN_RLHF)}, library=library)
    from sails_align.training.rlhf.run import main

    return main(argv, prog)


def check_options(method: Method, argv: Sequence[str] | None, prog: str | None, *more: type) -> tuple[Any, ...]:
    """Show help, or refuse options that cannot be used, as far as that needs no import of TRL's trainers.

    Args:
        method: of the training.
        argv: the command line; None: this process's.
        prog: the command's name in help.
        more: dataclasses of other options of the command.

    Returns:
        an instance of each of `more`.

    Raises:
        InputError: for an unknown option, and for a value of our options that cannot be used.
    """
    line, library = CommandLine.read(argv), TRAINER_OPTIONS[method]
    classes = [*more, *own_options(method), ScriptArguments, ModelConfig]
    if "--help-all" not in line.options and library.names():
        return line.parse(classes, prog=prog, groups=GROUPS, library=library)[: len(more)]
    from trl import DPOConfig, SFTConfig

    classes.append(SFTConfig if method == "sft" else DPOConfig)
    texts = {**library.shown, **_OTHERS}
    return line.parse(classes, prog=prog, groups=GROUPS, defaults={"bf16": False}, texts=texts)[: len(more)]
