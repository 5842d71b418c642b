"""SAILS with one change in each, and adapters with another start, as the study of ablations compares them."""

from dataclasses import dataclass, replace

from sails_align.core.registry import Registry
from sails_align.experiments.plan import Run, option_groups, option_words

_READERS, _WRITERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
_ATTENTION = ("--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Ablation:
    """A run that differs from SAILS in some options."""

    name: str
    label: str
    options: tuple[str, ...]
    is_of_testbed: bool = False
    """Whether it is about the testbed's blocks: there SAILS trains the last two of five."""

    def of(self, run: Run) -> Run:
        """Return a run with these options in place of its own."""
        options = option_groups(run.options) | option_groups(self.options)
        return replace(run, name=self.name, label=self.label, options=option_words(options))


_ABLATIONS = (
    Ablation("paper", "SFT-SAILS (paper)", ("--preset", "paper")),
    Ablation("basis-random", "SFT-random-basis", ("--init", "random_basis")),
    Ablation(
        "basis-random-free", "SFT-random-basis (not frozen)", ("--init", "random_basis", "--subspace_mode", "init")
    ),
    Ablation("basis-random-features", "SFT-random-features", ("--init", "random_features")),
    Ablation("basis-pca", "SFT-PCA", ("--init", "activation_pca")),
    Ablation("basis-mean-diff", "SFT-mean-difference", ("--init", "mean_diff")),
    Ablation("score-standardized", "score: standardized", ("--score", "standardized")),
    Ablation("score-attribution", "score: attribution", ("--score", "attribution")),
    Ablation("score-read-write", "score: read and write", ("--score", "read_write")),
    Ablation("contrast-response", "contrast: response", ("--contrast", "response")),
    Ablation("contrast-prompt", "contrast: prompt", ("--contrast", "prompt")),
    Ablation("contrast-both", "contrast: both", ("--contrast", "both")),
    Ablation("tokens-all", "prompt tokens: all", ("--prompt_tokens", "all")),
    Ablation("unweighted", "weighting: none", ("--weighting", "false")),
    Ablation("k-16", "k: 16", ("--top_k", "16")),
    Ablation("k-256", "k: 256", ("--top_k", "256")),
    Ablation("tau", "centred, tau: 0.8", ("--center", "true", "--tau", "0.8")),
    Ablation("not-whitened", "whitening: none", ("--benign_whitening", "false")),
    Ablation("layers-all", "layers: all", ("--layer_map", "nearest")),
    Ablation("layers-sae", "layers: those of SAEs", ("--layer_map", "sae_only")),
    Ablation("readers-only", "modules: readers only", ("--lora_target_modules", *_READERS)),
    Ablation("writers-only", "modules: writers only", ("--lora_target_modules", *_WRITERS)),
    Ablation("fold-norm", "norm: folded", ("--fold_norm", "true")),
    Ablation("mode-init", "mode: init", ("--subspace_mode", "init")),
    Ablation("mode-freeze", "mode: freeze", ("--subspace_mode", "freeze")),
    Ablation("mode-decay", "mode: decay", ("--subspace_mode", "decay")),
    Ablation("rank-4", "rank: 4", ("--lora_r", "4")),
    Ablation("rank-16", "rank: 16", ("--lora_r", "16")),
    Ablation("attention", "modules: attention only", _ATTENTION),
    Ablation("lora-attention", "SFT-LoRA (attention)", ("--init", "default", *_ATTENTION)),
    Ablation("lora-rank-16", "SFT-LoRA (rank 16)", ("--init", "default", "--lora_r", "16")),
    Ablation(
        "lora-last-blocks",
        "SFT-LoRA (SAILS' blocks)",
        (
            *("--init", "default", "--lora_target_modules"),
            *(f"layers.{block}.self_attn.{name}_proj" for block in (3, 4) for name in "qkvo"),
            *(f"layers.{block}.mlp.{name}_proj" for block in (3, 4) for name in ("gate", "up", "down")),
        ),
        is_of_testbed=True,
    ),
)
ABLATIONS: Registry[Ablation] = Registry("ablation", {ablation.name: ablation for ablation in _ABLATIONS})
"""SAILS with one change in each, and other adapters."""
