"""Options of the initialization: SAEs, subspace, and how adapters use it.

A field whose default is None takes its value from the preset.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sails_align.core.errors import InputError
from sails_align.core.options import check_choices, check_positive, option
from sails_align.initializers import INITIALIZERS, Initializer
from sails_align.saes.source import SAESource
from sails_align.subspace.options import CHOICES, DECIDES_SUBSPACE, PRESETS, DiscoveryOptions


@dataclass(frozen=True)
class InitializerOptions:
    """Options of the safety subspace and of the adapters' initialization in it."""

    init: str | None = option(
        None,
        "Initialization of the adapters: sails (SAE features, the default), a baseline subspace "
        "(random_basis, random_features, activation_pca, mean_diff), guardspace (keeps what the model does on harmful "
        "prompts), sc_lora (output directions of the task), or one of PEFT's: default (plain LoRA), gaussian, "
        "orthogonal, pissa, olora, eva.",
    )
    harmful_prompts: str | None = option(
        None,
        "Harmful prompts that --init guardspace and sc_lora look at: the name of a prompt set, a file, a dataset on "
        "the hub, or testbed. Default: the prompts of --dataset_name, taken to be harmful.",
    )
    adapter_path: str | None = option(
        None,
        "A trained LoRA adapter of the model to continue from, such as the folder of an SFT run. For "
        "DPO the reference is then the model with that adapter.",
    )
    preset: str = option(
        "default", "Values for the method's options that are not given: default (best on the testbed) or paper."
    )
    sae_release: str | None = option(None, "A release that sae-lens knows, such as gemma-scope-2b-pt-res-canonical.")
    sae_ids: list[str] | None = option(None, "SAEs of the release (or sub-folders of --sae_path), one per layer.")
    sae_path: str | None = option(None, "A local SAE, a folder of SAEs, or a params.npz, instead of a release.")
    sae_allow_mismatch: bool = option(False, "Accept SAEs that were trained on a model with another name.")
    sae_placement: str = option(
        "all",
        "SAEs in memory: all of them on every process; by_layer: one at a time, with one pass "
        "over the data for each; sharded: each process holds those of some layers, and reads all "
        "data for them.",
    )
    subspace_path: str | None = option(None, "A saved subspace; discovery is skipped.")
    contrast: str | None = option(
        None,
        "What is compared: response (chosen against rejected responses), prompt (harmless against "
        "harmful prompts), both, or split (modules that read use features that harmful prompts activate "
        "more, modules that write use the response contrast).",
    )
    prompt_tokens: str | None = option(
        None, "Prompt tokens that are averaged: all of the last user turn, or only the last one."
    )
    score: str | None = option(
        None,
        "Score of a latent: mean_diff (the paper's), standardized (by the pooled deviation), attribution "
        "(its effect on how much likelier the chosen response to a harmful request is than the rejected one; "
        "needs both, and runs the whole model forward and back, so it is slower), or read_write (the product of "
        "mean_diff and attribution).",
    )
    top_k: int | None = option(None, "Number of latents kept in each layer.")
    weighting: bool | None = option(None, "Weight decoder directions by their score before the PCA.")
    center: bool | None = option(None, "Subtract the mean direction before the PCA, as a literal PCA does.")
    tau: float | None = option(None, "Share of the variance that the PCA keeps, in (0, 1].")
    benign_whitening: bool | None = option(
        None,
        "Rank the directions for readers against the variance of harmless conversations "
        "(generalized eigenvectors), so that adapters respond little to these.",
    )
    layer_map: str | None = option(
        None,
        "Layers without an SAE use the subspace of the nearest one (nearest), or have no adapter "
        "(sae_only); from_onset: nearest, but blocks before the first layer that separates "
        "harmful from harmless prompts have no adapter.",
    )
    fold_norm: bool | None = option(
        None, "Divide directions by the RMSNorm gain between the residual stream and the module."
    )
    init_scale: float | None = option(None, "Norm of each initial direction.")
    subspace_mode: str | None = option(
        None,
        "init: train freely; freeze: freeze the factor in the subspace; freeze_readers: freeze it "
        "only in modules that read; decay: pull it back towards the subspace.",
    )
    max_discovery_examples: int = option(2000, "Maximum number of examples on each side of the contrast.")

    given: frozenset[str] = field(init=False, repr=False, default=frozenset())
    """The options of the preset that were given, so that they are obeyed or refused, never adjusted."""

    def __post_init__(self) -> None:
        check_choices(self, {**CHOICES, "init": INITIALIZERS.names()})
        preset = PRESETS[self.preset]
        # Values of the preset replace what was not given. This is the only place that sets an option.
        object.__setattr__(self, "given", frozenset(name for name in preset if getattr(self, name) is not None))
        for name in preset.keys() - self.given:
            object.__setattr__(self, name, preset[name])
        self.discovery()
        check_positive(self, "init_scale")
        if self.adapter_path is not None and self.init is not None:
            raise InputError("--adapter_path and --init are both given, but training starts from one; leave one out")

    @property
    def initializer(self) -> Initializer:
        """Return the initialization; without one (full fine-tuning, a trained adapter) that of plain LoRA."""
        return INITIALIZERS.get(self.init or "default")

    @property
    def freeze(self) -> bool | Literal["readers"]:
        """Return which factors in the subspace are not trained, as `initialize` takes it."""
        return {"freeze": True, "freeze_readers": "readers"}.get(str(self.subspace_mode), False)  # pyright: ignore[reportReturnType]

    @property
    def uses_subspace(self) -> bool:
        """Return whether adapters are initialized in a subspace."""
        return self.initializer.makes_subspace

    def replaced(self, **changes: Any) -> "InitializerOptions":
        """Return the options with some changed; the preset fills what was not given again."""
        unset = {name: None for name in PRESETS[self.preset] if name not in self.given}
        return replace(self, **(unset | changes))

    def subspace_options(self) -> dict[str, Any]:
        """Return the options that affect the subspace."""
        return {name: getattr(self, name) for name in ("init", *DECIDES_SUBSPACE)}

    def discovery(self, **more: Any) -> DiscoveryOptions:
        """Return the options of discovery; `more` comes from the trainer's options."""
        names = (*DECIDES_SUBSPACE, "layer_map", "sae_placement", "given")
        return DiscoveryOptions(**{name: getattr(self, name) for name in names}, **more)

    def saes(self) -> SAESource:
        """Return the named SAEs."""
        return SAESource(self.sae_release, tuple(self.sae_ids or ()), self.sae_path, self.sae_allow_mismatch)
