"""What a comparison asks besides its main question: what each part of the method does, how many examples it takes, and
in which worlds it helps. Each is a set of plans, whose cells are kept beside those of the main one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sails_align.comparison.plan import RUNS, Measures, Plan, Run

Kind = Literal["main", "ablations", "examples", "worlds"]

_ATTENTION = ("--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj")


def _variant(name: str, label: str, *options: str, init: str = "sails") -> Run:
    return Run(name, label, "sft", ("--init", init, *options))


ABLATIONS: tuple[Run, ...] = (
    _variant("paper", "preset paper", "--preset", "paper"),
    _variant("basis-random", "basis: random", init="random_basis"),
    _variant("basis-random-free", "basis: random, not frozen", "--subspace_mode", "init", init="random_basis"),
    _variant("basis-random-features", "basis: random SAE features", init="random_features"),
    _variant("basis-pca", "basis: activation PCA", init="activation_pca"),
    _variant("basis-mean-diff", "basis: mean difference", init="mean_diff"),
    _variant("score-standardized", "score: standardized", "--score", "standardized"),
    _variant("contrast-response", "contrast: response", "--contrast", "response"),
    _variant("contrast-prompt", "contrast: prompt", "--contrast", "prompt"),
    _variant("contrast-both", "contrast: both", "--contrast", "both"),
    _variant("tokens-all", "prompt tokens: all", "--prompt_tokens", "all"),
    _variant("unweighted", "unweighted", "--weighting", "false"),
    _variant("k-16", "k: 16", "--top_k", "16"),
    _variant("k-256", "k: 256", "--top_k", "256"),
    _variant("tau", "centred, tau: 0.8", "--center", "true", "--tau", "0.8"),
    _variant("not-whitened", "not against harmless variance", "--benign_whitening", "false"),
    _variant("layers-all", "layers: all", "--layer_map", "nearest"),
    _variant("layers-sae", "layers: those of SAEs", "--layer_map", "sae_only"),
    _variant(
        "side-a", "side: readers alone", "--lora_target_modules", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"
    ),
    _variant("side-b", "side: writers alone", "--lora_target_modules", "o_proj", "down_proj"),
    _variant("fold-norm", "norm folded", "--fold_norm", "true"),
    _variant("mode-init", "mode: init", "--subspace_mode", "init"),
    _variant("mode-freeze", "mode: freeze", "--subspace_mode", "freeze"),
    _variant("mode-decay", "mode: decay", "--subspace_mode", "decay"),
    _variant("rank-4", "rank: 4", "--lora_r", "4"),
    _variant("rank-16", "rank: 16", "--lora_r", "16"),
    _variant("attention", "attention alone", *_ATTENTION),
    _variant("lora-attention", "LoRA, attention alone", *_ATTENTION, init="default"),
)
"""SAILS' default preset with one thing changed in each."""
EXAMPLES = (16, 64, 256, 1024)
SMALL = ("sft-lora", "sft-sails", "sft-full")
IN_WORLDS = (
    *(RUNS[name] for name in SMALL),
    _variant("basis-mean-diff", "mean difference", init="mean_diff"),
    _variant("basis-pca", "activation PCA", init="activation_pca"),
)


@dataclass(frozen=True)
class Study:
    """Plans that are looked at together."""

    kind: Kind
    plans: tuple[tuple[str, Plan], ...]
    """Each with what it is called."""


def ablations(plan: Plan, n_seeds: int) -> Study:
    """Every part of the method changed, one at a time; with the highest rates of the grid, since nothing is learnt at
    the others."""
    runs = (RUNS["sft-lora"], RUNS["sft-sails"], *ABLATIONS)
    rates = tuple(sorted(plan.learning_rates)[-3:])
    return Study("ablations", (("ablations", replace(_alone(plan), runs=runs, n_seeds=n_seeds, learning_rates=rates)),))


def examples(plan: Plan, numbers: Sequence[int], n_seeds: int) -> Study:
    """The same methods with other numbers of training examples."""
    runs = tuple(RUNS[name] for name in SMALL)
    plans = []
    for number in sorted(set(numbers)):
        measures = replace(_alone(plan).measures, n_examples=number)
        plans.append((str(number), replace(_alone(plan), runs=runs, n_seeds=n_seeds, measures=measures)))
    return Study("examples", tuple(plans))


def worlds(plan: Plan, names: Sequence[str]) -> Study:
    """The same methods, each with its own learning rate, in other worlds."""
    return Study("worlds", tuple((name, replace(_alone(plan), runs=IN_WORLDS, world=name)) for name in names))


def _alone(plan: Plan) -> Plan:
    """The plan without what takes long: no attacks, no capability, no further training; and one seed to tune with."""
    measures = Measures(
        n_examples=plan.measures.n_examples,
        n_prompts=plan.measures.n_prompts,
        n_attacked=0,
        n_capability=0,
        relearning=False,
    )
    return replace(plan, measures=measures, n_tuning_seeds=1)
