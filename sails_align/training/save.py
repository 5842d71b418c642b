"""Save what a training leaves: the adapter in PEFT's format or the model, and its tokenizer, each file as a whole.

<output_dir>/adapter_model.safetensors, adapter_config.json     the trained adapter
<output_dir>/model.safetensors, config.json                     or, after full fine-tuning, the model
<output_dir>/clade.safetensors, clade.json                      or, with --clade, the gains and biases of norms
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from sails_align.initializers.difference import save_difference
from sails_align.models.clade import clade_of, save_clade
from sails_align.models.generation import eos_ids, neutral_config
from sails_align.models.language_model import copy_processor
from sails_align.training.plan import TrainingPlan
from sails_align.training.trainer import INITIAL_ADAPTER, PAIRS, START, AlignmentTrainer


@contextmanager
def saved_whole(trainer: Trainer, output_dir: Path) -> Iterator[Path]:
    """Save the model, its tokenizer and the trainer's options in a temporary folder for the block to complete.

    Then each file takes its place in the output folder as a whole. All processes must call it.
    """
    part = output_dir / ".model"
    try:
        trainer.save_model(str(part), _internal_call=True)  # by all processes; else TRL would push it to the hub
        yield part
        if trainer.is_world_process_zero():
            for file in filter(Path.is_file, sorted(part.iterdir())):  # TRL's copy of the adapter is in a folder
                file.chmod(0o644)  # safetensors makes it private
                os.replace(file, output_dir / file.name)
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(part, ignore_errors=True)


def save_model(args: TrainingPlan, trainer: AlignmentTrainer, output_dir: Path) -> None:
    """Write the adapter (or the fine-tuned model), the tokenizer and the trainer's options; delete temporary files.

    An adapter whose initialization changed the base weights, or whose start is subtracted, is written as the change
    since then: a plain LoRA adapter of twice the rank, for the untouched base. All processes must call it.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    with saved_whole(trainer, output_dir) as part:
        frozen = frozen_adapter_weights(model)
        if trainer.is_world_process_zero():
            assert any(part.glob("*.safetensors")), "engines that save no whole weights are refused with the options"
            add_to_adapter(part, frozen)
            if args.model.use_peft:
                base = model.get_base_model()
                neutral_config(eos_ids(base.generation_config)).save_pretrained(str(part))
            elif args.clade:
                for file in [part / "config.json", *part.glob("model*.safetensors*")]:
                    file.unlink()  # the base's
                save_clade(clade_of(model), part)
            else:
                copy_processor(str(args.model.model_name_or_path), model.config, part, args.model.model_revision)
            if args.sails.initializer.changes_base:
                initial = output_dir / INITIAL_ADAPTER
                options = {"path_initial_model_for_weight_conversion": str(initial), "selected_adapters": ["default"]}
                model.save_pretrained(str(part), **options)
                shutil.rmtree(initial)
            if args.sails.initializer.trains_difference:
                save_difference(model, part)
                shutil.rmtree(output_dir / START, ignore_errors=True)
    if trainer.is_world_process_zero():
        shutil.rmtree(output_dir / PAIRS, ignore_errors=True)


def frozen_adapter_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Collect adapter weights that are not trained, which DeepSpeed ZeRO-3 leaves out of what it saves.

    All processes must call it. Returns names as in PEFT's files -> values on the CPU; nothing under other engines.
    """
    frozen = {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name and ".default" in name and not parameter.requires_grad
        if hasattr(parameter, "ds_id")  # how DeepSpeed marks parameters that it has split
    }
    with gather_params_ctx(list(frozen.values()), modifier_rank=None):
        return {name: parameter.detach().cpu().clone() for name, parameter in frozen.items()}


def add_to_adapter(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Add weights to the file of an adapter, if there are any."""
    if weights:
        path = folder / ADAPTER_WEIGHTS
        part = path.with_suffix(".part")
        save_file({**load_file(path), **weights}, part, metadata={"format": "pt"})
        os.replace(part, path)
