"""Options of SAE trainings."""

from dataclasses import dataclass, replace

from sails_align.core.errors import InputError
from sails_align.core.options import check_choices, check_least, option
from sails_align.saes.algorithms import ALGORITHMS

FULL = "float32"
WARM_UP = 0.05
"""Share of the training steps in which learning rate and sparsity loss rise."""


@dataclass(frozen=True)
class SAETrainingOptions:
    """SAEs and their training."""

    d_sae: int | None = option(None, "Latents (default: 8 times d_model).")
    k: int = option(32, "Latents active at a token: exactly (topk) or on average (jumprelu).")
    architecture: str = option("topk", f"One of {', '.join(ALGORITHMS.names())}.")
    lr: float | None = option(
        None,
        "Adam's learning rate (default: 2 / sqrt(d_model d_sae), which suits about 10^4 steps; "
        "choose less for many more).",
    )
    n_tokens: int = option(1_000_000, "Tokens to train on; texts are repeated if need be.")
    batch_size: int = option(512, "Tokens in a step.")
    context_size: int = option(128, "Tokens the model sees at once.")
    seed: int = option(0, "Seed of the initial weights, the order of the text, and the held-out part.")
    eval_tokens: int = option(100_000, "Held-out tokens to measure on; at most a tenth of the text.")
    buffer_tokens: int = option(65_536, "Tokens whose hidden states are in memory and shuffled together.")
    checkpoint_steps: int = option(2000, "Steps between checkpoints.")
    save_dtype: str = option(FULL, "Type of the saved weights: float32, float16 or bfloat16. They are used in float32.")

    def __post_init__(self) -> None:
        check_choices(self, {"architecture": ALGORITHMS.names(), "save_dtype": (FULL, "float16", "bfloat16")})
        check_least(self, d_sae=1, k=1, batch_size=1, context_size=2, eval_tokens=1, buffer_tokens=1)
        check_least(self, checkpoint_steps=1)
        if self.d_sae is not None and self.k > self.d_sae:
            raise InputError(f"k is {self.k}, but there are only d_sae {self.d_sae} latents; choose a smaller k")
        if self.lr is not None and not self.lr > 0:
            raise InputError(f"lr is {self.lr}; choose more than 0")
        if self.n_tokens < self.batch_size:
            raise InputError(f"n_tokens is {self.n_tokens}, less than one batch of {self.batch_size}; raise it")

    @property
    def n_steps(self) -> int:
        return self.n_tokens // self.batch_size

    def for_width(self, d_model: int) -> "SAETrainingOptions":
        """Fill in the defaults that depend on the model's width."""
        d_sae = 8 * d_model if self.d_sae is None else self.d_sae
        return replace(self, d_sae=d_sae, lr=2 / (d_model * d_sae) ** 0.5 if self.lr is None else self.lr)
