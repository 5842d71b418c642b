"""Train an aligned model further, on harmless requests or on a few harmful ones, to measure what safety is left."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from sails_align.data.messages import user
from sails_align.data.pairs import to_sft
from sails_align.testbed.world import World

LEARNING_RATE = 1e-3
"""The rate with which full fine-tuning aligns best."""
BATCH_SIZE = 16
DATA = {"benign": ("train_benign", 128, 1), "harmful": ("train_harmful", 16, 4)}
"""Split, number of answered requests, and epochs: 8 and 4 steps."""
FIRST_SEED = 500
"""First seed of the choice of requests; the alignment data has smaller ones."""


def trained_on(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, seed: int, folder: Path
) -> Any:
    """Train all weights of an aligned model without adapters, in place, on the answered requests of `DATA[name]`.

    The seed decides their choice and order. TRL's files go to the folder.
    """
    split, n, epochs = DATA[name]
    requests = world.requests(split, n, seed=FIRST_SEED + seed)
    rows = [{"prompt": [user(request.prompt)], "chosen": request.answer} for request in requests]
    options = SFTConfig(
        output_dir=str(folder),
        learning_rate=LEARNING_RATE,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH_SIZE,
        max_length=64,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=model.device.type == "cpu",
    )
    model.requires_grad_(True)
    trainer = SFTTrainer(model, options, train_dataset=to_sft(Dataset.from_list(rows)), processing_class=tokenizer)
    trainer.train()
    changed: Any = trainer.accelerator.unwrap_model(trainer.model)
    return changed.eval()
