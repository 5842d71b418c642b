"""Train one layer's SAE with sae-lens' `SAETrainer`, in steps that can be stopped, saved and resumed.

The result is an inference SAE whose input scaling and decoder norms are folded into the weights: it takes raw block
outputs, and its decoder rows are unit vectors of the residual stream.

Shapes: T tokens, D d_model, F d_sae.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sails_align.saes.algorithms import ALGORITHMS
from sails_align.saes.files import WEIGHTS
from sails_align.saes.graph import GraphPenalty
from sails_align.saes.options import FULL, WARM_UP, SAETrainingOptions

DECAY = 0.3
"""Share of the training steps, at the end, in which the learning rate falls."""
DEAD_AFTER = 0.05
"""A latent that has not fired for this share of the steps is dead: the auxiliary loss then trains it on what the others
leave over (TopK), or pulls its pre-activations up (JumpReLU)."""


class LayerTrainer:
    """Train one SAE on hidden states of one layer, one buffer at a time.

    The first buffer sets the input scaling (mean norm -> sqrt(D), so that one learning rate suits all layers) and
    starts the decoder bias at the mean. `metadata` is the SAE configuration's: model, hook point, data. `penalty` is on
    the decoder.
    """

    def __init__(
        self,
        d_model: int,
        options: SAETrainingOptions,
        device: str,
        metadata: dict[str, Any],
        penalty: GraphPenalty | None = None,
    ) -> None:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        n_steps = options.n_steps
        assert options.lr is not None
        self.options = options
        self.next_buffer = 0
        self.seconds = 0.0
        self.trainer = SAETrainer(
            cfg=SAETrainerConfig(
                total_training_samples=n_steps * options.batch_size,
                train_batch_size_samples=options.batch_size,
                lr=options.lr,
                lr_end=options.lr,
                lr_warm_up_steps=int(WARM_UP * n_steps) if n_steps >= 2 / WARM_UP else 0,
                lr_decay_steps=int(DECAY * n_steps),
                dead_feature_window=max(1, int(DEAD_AFTER * n_steps)),
                device=device,
            ),
            sae=_new_sae(d_model, options, device, metadata),
            data_provider=iter(()),  # `step` is given its batches
        )
        if penalty is not None:
            penalty.add_to(self.trainer.sae.W_dec)

    @property
    def steps(self) -> int:
        return self.trainer.n_training_steps

    @property
    def done(self) -> bool:
        return self.steps >= self.options.n_steps

    def train(self, hidden_TD: Tensor) -> None:
        """Train on a buffer of hidden states in random order, until it or the training ends.

        An incomplete last batch is left out. The order depends on the seed and the number of the buffer alone.
        """
        trainer = self.trainer
        if trainer.activation_scaler.scaling_factor is None:
            scaling = hidden_TD.shape[1] ** 0.5 / hidden_TD.float().norm(dim=1).mean().item()
            trainer.activation_scaler.scaling_factor = scaling
            trainer.sae.b_dec.data.copy_(hidden_TD.float().mean(0) * scaling)
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.next_buffer)
        order_T = torch.randperm(len(hidden_TD), generator=generator).to(hidden_TD.device)
        for batch in order_T.split(self.options.batch_size):
            if len(batch) < self.options.batch_size or self.done:
                break
            trainer.step(hidden_TD[batch].float())
            trainer.n_training_steps += 1
        self.next_buffer += 1

    def save_sae(self, folder: Path) -> None:
        """Fold scaling and norms into the weights, and write an inference SAE. Training cannot go on after that."""
        from sae_lens import TopKTrainingSAE

        sae = self.trainer.sae
        scaling = self.trainer.activation_scaler.scaling_factor
        assert scaling is not None
        sae.fold_activation_norm_scaling_factor(scaling)
        sae.fold_W_dec_norm()
        if isinstance(sae, TopKTrainingSAE):
            sae.cfg.rescale_acts_by_decoder_norm = False
        sae.save_inference_model(folder)
        if self.options.save_dtype != FULL:
            tensors = load_file(folder / WEIGHTS)
            dtype = getattr(torch, self.options.save_dtype)
            save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / WEIGHTS)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that a resumed training needs, as tensors and JSON (sae-lens' own trainer state is a pickle)."""
        trainer = self.trainer
        tensors = {f"sae.{name}": tensor for name, tensor in trainer.sae.state_dict().items()}
        optimizer = trainer.optimizer.state_dict()
        for index, slots in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{slot}": tensor for slot, tensor in slots.items()}
        tensors["n_forward_passes_since_fired"] = trainer.n_forward_passes_since_fired
        counters = {
            "n_training_steps": trainer.n_training_steps,
            "n_training_samples": trainer.n_training_samples,
            "next_buffer": self.next_buffer,
            "seconds": self.seconds,
            "scaling_factor": trainer.activation_scaler.scaling_factor,
            "lr": [group["lr"] for group in optimizer["param_groups"]],
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "coefficients": {name: item.state_dict() for name, item in trainer.coefficient_schedulers.items()},
        }
        return tensors, counters

    def load_state(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Continue from a saved `state`."""
        trainer = self.trainer
        sae_state = {name.removeprefix("sae."): tensor for name, tensor in tensors.items() if name.startswith("sae.")}
        trainer.sae.load_state_dict(sae_state)
        optimizer = trainer.optimizer.state_dict()
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".")
                optimizer["state"].setdefault(int(index), {})[slot] = tensor
        for group, lr in zip(optimizer["param_groups"], counters["lr"], strict=True):
            group["lr"] = lr
        trainer.optimizer.load_state_dict(optimizer)
        trainer.lr_scheduler.load_state_dict(counters["lr_scheduler"])
        for name, state in counters["coefficients"].items():
            trainer.coefficient_schedulers[name].load_state_dict(state)
        trainer.n_forward_passes_since_fired.copy_(tensors["n_forward_passes_since_fired"])
        trainer.n_training_steps = counters["n_training_steps"]
        trainer.n_training_samples = counters["n_training_samples"]
        trainer.activation_scaler.scaling_factor = counters["scaling_factor"]
        self.next_buffer, self.seconds = counters["next_buffer"], counters["seconds"]


def _new_sae(d_model: int, options: SAETrainingOptions, device: str, metadata: dict[str, Any]) -> Any:
    from sae_lens.saes.sae import SAEMetadata

    common = {
        "d_in": d_model,
        "d_sae": options.d_sae,
        "device": device,
        "normalize_activations": "expected_average_only_in",
        "metadata": SAEMetadata(**metadata),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return ALGORITHMS.get(options.architecture).load()(options, common)
