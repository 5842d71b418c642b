"""What safety is left when an aligned model is trained on: on harmless requests, or on a few harmful ones."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from sails_align.data.pairs import to_sft
from sails_align.testbed.world import World

LEARNING_RATE = 1e-3
"""Of all weights; the one that full fine-tuning aligns best with."""
BATCH_SIZE = 16
DATA = {"benign": ("train_benign", 128, 1), "harmful": ("train_harmful", 16, 4)}
"""By name: the split, how many requests with their answers, and epochs: 8 and 4 steps."""
FIRST_SEED = 500
"""Of the choice of requests: not those of the alignment data's seeds."""


def trained_on(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, seed: int, folder: Path
) -> Any:
    """Train all weights of a model, in place, on answered requests.

    Args:
        name: of `DATA`.
        model: aligned, without adapters.
        tokenizer: of the model.
        world: that the requests are from.
        seed: of the choice of requests, and of their order.
        folder: for what TRL writes.
    """
    split, n, epochs = DATA[name]
    requests = world.requests(split, n, seed=FIRST_SEED + seed)
    rows = [{"prompt": [{"role": "user", "content": request.prompt}], "chosen": request.answer} for request in requests]
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
