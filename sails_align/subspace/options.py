"""Options of the method, in the order in which they act, and the presets that give their defaults.

A field whose default is None takes its value from the preset.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from sails_align.core.errors import InputError
from sails_align.core.options import check_choices

Method = Literal["sft", "dpo"]

PEFT_INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "eva")
"""Initialisations that PEFT does itself, without a subspace."""
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` that leave the base weights alone. The others take something out of them (pissa, olora, corda,
lora_ga), or train on rounded ones (loftq), so that the adapter does not fit the base model as it is published."""
SUBSPACE_INITS = ("sails", "random_basis", "random_features", "activation_pca", "mean_diff")

CHOICES = {
    "init": (*SUBSPACE_INITS, *PEFT_INITS),
    "preset": ("default", "paper"),
    "contrast": ("response", "prompt", "both", "split"),
    "score": ("mean_diff", "standardized"),
    "prompt_tokens": ("all", "last"),
    "layer_map": ("nearest", "sae_only", "from_onset"),
    "subspace_mode": ("init", "freeze", "freeze_readers", "decay"),
    "sae_placement": ("all", "by_layer", "sharded"),
}

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


@dataclass
class SailsArguments:
    """Where the safety subspace comes from, and how adapters start in it."""

    init: str | None = field(
        default=None,
        metadata={
            "help": "What the adapters start from: sails (SAE features; what is used if nothing is said), a rival "
            "subspace (random_basis, random_features, activation_pca, mean_diff), or one of PEFT's own "
            "initialisations: default (plain LoRA), gaussian, orthogonal, pissa, olora, eva."
        },
    )
    adapter_path: str | None = field(
        default=None,
        metadata={
            "help": "A trained LoRA adapter of the model to start from, such as the folder of an SFT run. For DPO the "
            "reference is then the model with that adapter."
        },
    )
    preset: str = field(
        default="default",
        metadata={"help": "Gives every option left out: default (measured best on the testbed) or paper."},
    )
    sae_release: str | None = field(
        default=None, metadata={"help": "A release of sae-lens, such as gemma-scope-2b-pt-res-canonical."}
    )
    sae_ids: list[str] | None = field(
        default=None, metadata={"help": "Which SAEs of the release (or sub-folders of --sae_path), one a layer."}
    )
    sae_path: str | None = field(
        default=None, metadata={"help": "Instead of a release: a local SAE, a folder of them, or a params.npz."}
    )
    sae_allow_mismatch: bool = field(
        default=False, metadata={"help": "Accept SAEs that were trained on a model of another name."}
    )
    sae_placement: str = field(
        default="all",
        metadata={"help": "SAEs in memory at a time: all of them on every process; by_layer: one, with a pass over the "
                  "data for each; sharded: each process has those of some layers, and reads all data for these."},
    )  # fmt: skip
    subspace_path: str | None = field(
        default=None, metadata={"help": "A saved subspace to start from; discovery is not run."}
    )
    contrast: str | None = field(
        default=None,
        metadata={
            "help": "What is compared: response (chosen against rejected responses), prompt (harmless against harmful "
            "prompts), both together, or split: modules that read take what harmful prompts activate more, modules "
            "that write take the response contrast."
        },
    )
    prompt_tokens: str | None = field(
        default=None,
        metadata={"help": "Tokens of a prompt that are averaged: all of the last user turn, or last (where it ends)."},
    )
    score: str | None = field(
        default=None,
        metadata={"help": "Score of a latent: mean_diff (the paper's) or standardized (by the pooled deviation)."},
    )
    top_k: int | None = field(default=None, metadata={"help": "Latents kept in each layer."})
    weighting: bool | None = field(
        default=None, metadata={"help": "Weight decoder directions by their score before the PCA."}
    )
    center: bool | None = field(
        default=None, metadata={"help": "Subtract the mean direction before the PCA, as a literal PCA does."}
    )
    tau: float | None = field(default=None, metadata={"help": "Share of the variance the PCA keeps, in (0, 1]."})
    benign_whitening: bool | None = field(
        default=None,
        metadata={"help": "Rank what modules read against the variance of harmless conversations (generalised "
                  "eigenvectors), so that adapters see little of those."},
    )  # fmt: skip
    layer_map: str | None = field(
        default=None,
        metadata={"help": "Layers without an SAE take the subspace of the nearest one (nearest), or have no adapter "
                  "(sae_only); from_onset: nearest, but blocks before the first layer that tells harmful prompts from "
                  "harmless ones have none."},
    )  # fmt: skip
    fold_norm: bool | None = field(
        default=None,
        metadata={"help": "Divide directions by the RMSNorm gain between the residual stream and the module."},
    )
    init_scale: float | None = field(default=None, metadata={"help": "Norm of each initial direction."})
    subspace_mode: str | None = field(
        default=None,
        metadata={"help": "init (train on freely), freeze the side in the subspace, freeze_readers (only of modules "
                  "that read), or decay towards it."},
    )  # fmt: skip
    max_discovery_examples: int = field(
        default=2000, metadata={"help": "Examples of each side used to find the subspace, at most."}
    )

    given: frozenset[str] = field(init=False, repr=False, default=frozenset())
    """The options of the preset that were given, so that they are obeyed or refused, never adjusted."""

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        self.given = frozenset(name for name in PRESETS[self.preset] if getattr(self, name) is not None)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_choices(self, CHOICES)
        assert self.tau is not None
        assert self.top_k is not None
        if not 0.0 < self.tau <= 1.0:
            raise InputError(f"tau is {self.tau}, but it is a share of the variance: choose a value in (0, 1]")
        if self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}, but at least one latent must be kept: choose 1 or more")
        if self.init_scale is None or not 0.0 < self.init_scale < float("inf"):
            raise InputError(f"init_scale is {self.init_scale}, but it is the norm of a direction: choose above 0")
        if self.max_discovery_examples < 1:
            raise InputError(f"max_discovery_examples is {self.max_discovery_examples}; choose 1 or more")
        if self.adapter_path is not None and self.init is not None:
            raise InputError("--adapter_path and --init are both given, but training starts from one; leave one out")

    @property
    def uses_subspace(self) -> bool:
        """Whether adapters start in a subspace."""
        return self.init in SUBSPACE_INITS

    def subspace_options(self) -> dict[str, Any]:
        """The options that decide the subspace: what its artifact is keyed by."""
        names = ("init", "contrast", "prompt_tokens", "score", "top_k", "weighting", "center", "tau")
        return {name: getattr(self, name) for name in (*names, "benign_whitening", "max_discovery_examples")}


@dataclass
class DPOArguments:
    """Options of DPO besides TRL's own."""

    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Reference model, of the same vocabulary (default: the model that training starts from)."},
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "A Jinja file, or human_assistant: the chat template, if the tokenizer has none."},
    )
