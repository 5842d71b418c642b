"""Options of discovery, in the order in which they act, and the presets with their defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from sails_align.core.errors import InputError
from sails_align.core.options import check_choices, check_least, option

Method = Literal["sft", "dpo"]

CHOICES = {
    "preset": ("default", "paper"),
    "contrast": ("response", "prompt", "both", "split"),
    "score": ("mean_diff", "standardized", "attribution", "read_write"),
    "prompt_tokens": ("all", "last"),
    "layer_map": ("nearest", "sae_only", "from_onset"),
    "subspace_mode": ("init", "freeze", "freeze_readers", "decay"),
    "sae_placement": ("all", "by_layer", "sharded"),
}

BY_EFFECT = ("attribution", "read_write")
"""Scores that need the latents' effects on the refusal margin."""

PRESETS: dict[str, dict[str, Any]] = {
    # The paper read as literally as it can be. It leaves k open: 64 of 16k latents.
    "paper": {
        "contrast": "response",
        "score": "mean_diff",
        "prompt_tokens": "all",
        "top_k": 64,
        "weighting": False,
        "center": True,
        "tau": 0.8,
        "benign_whitening": False,
        "layer_map": "nearest",
        "fold_norm": False,
        "init_scale": 1.0,
        "subspace_mode": "init",
    },
    # What measured best on the testbed: docs/method.md.
    "default": {
        "contrast": "split",
        "score": "mean_diff",
        "prompt_tokens": "last",
        "top_k": 64,
        "weighting": True,
        "center": False,
        "tau": 1.0,
        "benign_whitening": True,
        "layer_map": "from_onset",
        "fold_norm": False,
        "init_scale": 1.0,
        "subspace_mode": "freeze_readers",
    },
}


@dataclass(frozen=True)
class DiscoveryOptions:
    """Options of discovery; the defaults are those of the preset `default`."""

    contrast: str = "split"
    prompt_tokens: str = "last"
    score: str = "mean_diff"
    top_k: int = 64
    weighting: bool = True
    center: bool = False
    tau: float = 1.0
    benign_whitening: bool = True
    layer_map: str = "from_onset"
    """With `from_onset`, the first layer that tells harmful from harmless prompts is looked for."""
    max_discovery_examples: int = 2000
    rank: int = 16
    """Directions of methods that could have any number of them."""
    max_length: int = 1024
    seed: int = 0
    sae_placement: str = "all"
    progress: bool = True
    given: frozenset[str] = frozenset()
    """The options that the user named: they are obeyed or refused, never adjusted to the data."""

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        if not 0.0 < self.tau <= 1.0:
            raise InputError(f"tau is {self.tau}, but it is a share of the variance: choose a value in (0, 1]")
        if self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}, but at least one latent must be kept: choose 1 or more")
        check_least(self, max_discovery_examples=1)


OF_TRAINING = ("rank", "max_length", "seed")
"""Options whose values come from those of the training."""
NOT_OF_SUBSPACE: Mapping[str, str] = {
    "layer_map": "known by whether hidden states are compared, too; the rest is the adapters'",
    "sae_placement": "how the machine does it, with the same result",
    "progress": "what is shown",
    "given": "known by the values",
}
"""Options that a subspace does not depend on, with the reason. Its artifact is keyed by all others."""
DECIDES_SUBSPACE = tuple(
    option.name for option in fields(DiscoveryOptions) if option.name not in (*OF_TRAINING, *NOT_OF_SUBSPACE)
)


@dataclass(frozen=True)
class DPOOptions:
    """Options of DPO in addition to TRL's."""

    ref_model_name_or_path: str | None = option(
        None, "Reference model with the same vocabulary (default: the model before training)."
    )
    chat_template_path: str | None = option(
        None, "Chat template for a tokenizer without one: a Jinja file, or human_assistant."
    )
