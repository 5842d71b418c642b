"""PEFT's own initializations, selected by `LoraConfig.init_lora_weights`.

Shapes: B batch, S sequence, T positions.
"""

from dataclasses import dataclass

import torch
from peft import EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from torch.utils.data import DataLoader

from sails_align.core.errors import InputError
from sails_align.data.tokens import TokenizedSide, padded
from sails_align.initializers.examples import StartExamples

EVA_BATCH = 8


@dataclass(frozen=True)
class PeftInitializer:
    """An initialization that PEFT runs when it creates the adapter."""

    init_lora_weights: bool | str

    def configure(self, config: LoraConfig) -> None:
        """Ask PEFT for it, in place; raise `InputError` if the configuration does not suit it."""
        config.init_lora_weights = self.init_lora_weights  # pyright: ignore[reportAttributeAccessIssue]


class Orthogonal(PeftInitializer):
    """Orthogonal A and B, whose product is zero."""

    def configure(self, config: LoraConfig) -> None:
        """Refuse an odd rank: half of it is for A and half for B."""
        if config.r % 2:
            raise InputError(f"lora_r is {config.r}, but --init orthogonal needs an even one; choose one")
        super().configure(config)


class Eva(PeftInitializer):
    """EVA (arXiv 2410.07170): lora_A holds the directions of largest variance in a module's input."""

    def configure(self, config: LoraConfig) -> None:
        """Keep the rank of every module."""
        super().configure(config)
        config.eva_config = EvaConfig(rho=1.0)

    def finish(self, model: PeftModel, examples: StartExamples, options: None) -> None:
        """Run training examples. Every process is given the same, and finds the same.

        Raises `InputError` if there are too few tokens for the rank.
        """
        usable = [sequence for sequence in examples.responses(examples.train) if any(sequence.mask)]
        loader = DataLoader(usable, batch_size=EVA_BATCH, collate_fn=_collated, drop_last=len(usable) > EVA_BATCH)  # pyright: ignore[reportArgumentType]
        device = next(model.parameters()).device
        try:
            initialize_lora_eva_weights(
                model,
                [{name: value.to(device) for name, value in batch.items()} for batch in loader],
                gather_distributed_inputs=False,
                show_progress_bar=False,
            )
        except ValueError as error:
            raise InputError(f"EVA cannot find directions: {error};\ngive more data, or a smaller --lora_r") from error
        config = model.peft_config["default"]
        assert isinstance(config, LoraConfig)
        config.init_lora_weights, config.eva_config = True, None  # from here on it is plain LoRA


def check_plain(config: LoraConfig, init: str) -> None:
    """Refuse a configuration of another kind than plain LoRA (rsLoRA is one), with an `InputError`."""
    unsupported = {"use_dora": config.use_dora, "lora_bias": config.lora_bias, "bias": config.bias != "none"}
    if refused := [name for name, is_used in unsupported.items() if is_used]:
        raise InputError(f"--init {init} trains plain LoRA adapters; leave out {', '.join(refused)}")


def _collated(batch: list[TokenizedSide]) -> dict[str, torch.Tensor]:
    input_ids_BS, attention_mask_BS, mask_BS = padded(batch)
    labels_BS = input_ids_BS.masked_fill(~mask_BS, -100)
    return {"input_ids": input_ids_BS, "attention_mask": attention_mask_BS, "labels": labels_BS}


DEFAULT = PeftInitializer(True)
GAUSSIAN = PeftInitializer("gaussian")
ORTHOGONAL = Orthogonal("orthogonal")
PISSA = PeftInitializer("pissa")
OLORA = PeftInitializer("olora")
EVA = Eva("eva")
