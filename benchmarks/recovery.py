"""How well is a safety subspace recovered: through SAE features, or straight from activations?

    python benchmarks/recovery.py --output docs/results/recovery.json

SAILS' theory (arXiv 2512.23260) says that with monosemantic features the error of the SAE route is arbitrarily small,
and that the direct route keeps at least sqrt(r - 1). Both are measured with the package's own code, on

- synthetic activations with known truth: `n_concepts` unit directions in fewer dimensions, sparse non-negative
  amounts of them, noise. Harmful prompts have one of r safety concepts each, harmless ones none. The "SAE" has one
  latent for each concept, whose direction is (1 - p) of the concept's and p of others' (p = 0: monosemantic), and
  encodes by a tied, ReLU-ed top-k;
- the testbed, where the truth is taken from labels: the directions from harmless prompts to each trained harm
  category's, at the end of prompts, from far more requests than the recovery sees.

The error is the projection distance sqrt(r - |T' B|^2) of the true subspace T and the recovered one B, each of r
directions (a mean difference has one): 0 if all is found, sqrt(r) if nothing is.

Shapes: N prompts, D dimensions, F concepts, R rank.
"""

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from sails_align.core.files import write_json
from sails_align.core.linalg import orthonormalize
from sails_align.evaluation.intervals import over_seeds
from sails_align.evaluation.metrics import NOT_NEGATIVE
from sails_align.initializers.activation_pca import ActivationPca
from sails_align.initializers.mean_difference import MeanDifference
from sails_align.initializers.random_basis import random_basis
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource
from sails_align.subspace.basis import build_subspace
from sails_align.subspace.concepts import last_token_states
from sails_align.subspace.methods import MethodInputs
from sails_align.subspace.options import DiscoveryOptions
from sails_align.subspace.selection import FeatureFitter, select_features
from sails_align.subspace.statistics import ActivationFitter
from sails_align.testbed.build import resolve_testbed
from sails_align.testbed.world import Request

ROUTES = ("SAE features", "mean difference", "activation PCA", "random")


@dataclass(frozen=True)
class Setting:
    """Of the synthetic activations."""

    d_model: int = 64
    n_concepts: int = 256
    n_active: int = 6
    """Concepts at a time, on average."""
    r: int = 4
    n: int = 1000
    """Prompts of each side."""
    noise: float = 0.05
    """Standard deviation along each dimension; a concept's amount is 0.5 to 1.5."""
    polysemanticity: float = 0.0
    """Share of a latent's direction that is other concepts'."""
    common: float = 0.0
    """Standard deviation of what all prompts vary in besides, along 8 directions: what a PCA finds first."""


SWEEPS = {
    "polysemanticity": (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
    "r": (1, 2, 4, 8, 16),
    "n": (30, 100, 300, 1000, 3000),
    "noise": (0.0, 0.05, 0.1, 0.2, 0.4),
    "n_concepts": (64, 128, 256, 512, 1024),
    "common": (0.0, 0.5, 1.0, 2.0),
}


@dataclass(frozen=True)
class Encoder:
    """A tied top-k encoder; what `FeatureFitter` needs of an SAE."""

    directions: torch.Tensor
    """(F, D)"""
    k: int

    @property
    def info(self) -> "Encoder":
        return self

    @property
    def d_sae(self) -> int:
        return len(self.directions)

    @property
    def W_dec_FD(self) -> torch.Tensor:
        return self.directions

    def encode(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        acts_TF = (hidden_TD @ self.directions.T).relu()
        least_T = acts_TF.topk(self.k, dim=1).values[:, -1:]
        return torch.where(acts_TF >= least_T, acts_TF, 0.0)


def recover(harmful_ND, harmless_ND, encoder, r: int, seed: int, top_k: int) -> dict[str, torch.Tensor]:
    """A basis (D, R) by each route."""
    features, activations = FeatureFitter({0: encoder}), ActivationFitter()
    for side, states_ND in (("aligned", harmless_ND), ("unaligned", harmful_ND)):
        for fitter in (features, activations):
            fitter.update("prompt", side, 0, states_ND)
    selection = select_features(features.result(), contrast="prompt", score="mean_diff", top_k=top_k, side="unaligned")
    pca: dict[str, Any] = {"tau": 1.0, "weighting": True, "center": False}
    of_activations = MethodInputs("prompt", stats=activations.result(), options=DiscoveryOptions(rank=r))
    found = {
        "SAE features": build_subspace(selection, {0: encoder}, provenance={}, **pca),
        "mean difference": MeanDifference().build(of_activations),
        "activation PCA": ActivationPca().build(of_activations),
        "random": random_basis(harmful_ND.shape[1], [0], r, seed, provenance={}),
    }
    return {route: subspace.bases[0][:, :r] for route, subspace in found.items()}


def error(true_DR: torch.Tensor, basis_DR: torch.Tensor) -> float:
    """Projection distance: see above."""
    inside = (true_DR.T.double() @ basis_DR.double()).square().sum().item()
    return max(true_DR.shape[1] - inside, 0.0) ** 0.5


def synthetic(setting: Setting, seed: int) -> dict[str, float]:
    """Errors of one draw."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    concepts_FD = normalize(normal(setting.n_concepts, setting.d_model), dim=1)
    common_KD = torch.linalg.qr(normal(setting.d_model, 8))[0].T

    def states(harmful: bool) -> torch.Tensor:
        size = (setting.n, setting.n_concepts)
        active_NF = torch.rand(*size, generator=generator) < setting.n_active / setting.n_concepts
        active_NF[:, : setting.r] = False
        if harmful:
            which_N = torch.randint(setting.r, (setting.n,), generator=generator)
            active_NF[torch.arange(setting.n), which_N] = True
        amounts_NF = active_NF * (0.5 + torch.rand(*size, generator=generator))
        varied_ND = setting.common * normal(setting.n, 8) @ common_KD
        return amounts_NF @ concepts_FD + varied_ND + setting.noise * normal(setting.n, setting.d_model)

    mixed_FD = normalize(normal(setting.n_concepts, setting.n_concepts) @ concepts_FD, dim=1)
    p = setting.polysemanticity
    decoder_FD = normalize((1 - p) * concepts_FD + p * mixed_FD, dim=1)
    encoder = Encoder(decoder_FD, k=setting.n_active + 2)
    found = recover(states(harmful=True), states(harmful=False), encoder, setting.r, seed, setting.r)
    true_DR = orthonormalize(concepts_FD[: setting.r].T)
    return {route: error(true_DR, basis_DR) for route, basis_DR in found.items()}


def on_testbed(name: str, n: int, seeds: range) -> list[dict[str, Any]]:
    """Errors in each SAE layer: the truth from all training requests, the recovery from `n` of each side."""
    testbed = resolve_testbed(name)
    world = testbed.world
    model = AutoModelForCausalLM.from_pretrained(testbed.model_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(testbed.model_path)
    saes = SAESet.load(SAESource(path=testbed.sae_path), model_config=model.config, model_name=testbed.model_path)

    def states(requests: list[Request]) -> dict[int, torch.Tensor]:
        asked = [[{"role": "user", "content": request.prompt}] for request in requests]
        return dict(last_token_states(model, tokenizer, list(saes), asked))

    everything = world.requests("train_harmful")
    harmless = states(world.requests("train_benign", 2000))
    harmful = states(everything)
    rows = []
    for layer, sae in saes.items():
        directions_DR = torch.stack(
            [
                harmful[layer][torch.tensor([request.category == category for request in everything])].mean(0)
                - harmless[layer].mean(0)
                for category in world.trained_categories
            ],
            dim=1,
        )
        true_DR = orthonormalize(directions_DR.double()).float()
        r = true_DR.shape[1]
        for seed in seeds:
            sides = [states(world.requests(f"train_{side}", n, seed=seed))[layer] for side in ("harmful", "benign")]
            found = recover(*sides, sae, r, seed, top_k=64)
            rows.append({"layer": layer, "r": r, "seed": seed, **{k: error(true_DR, b) for k, b in found.items()}})
    return rows


def told(values: list[float]) -> str:
    mean, low, high = over_seeds(values, NOT_NEGATIVE)
    return f"{mean:.2f}" if low is None else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--testbed", default="testbed")
    parser.add_argument("--n", type=int, default=128, help="requests of each side, on the testbed")
    args = parser.parse_args()
    torch.manual_seed(0)
    console, results = Console(), []
    for name, values in SWEEPS.items():
        table = Table(title=f"projection distance by {name}; else {asdict(Setting())}")
        for heading in (name, *ROUTES, "sqrt(r - 1)"):
            table.add_column(heading)
        for value in values:
            setting = replace(Setting(), **{name: value})
            rows = [synthetic(setting, seed) for seed in range(args.seeds)]
            results += [{"sweep": name, "value": value, "seed": seed, **row} for seed, row in enumerate(rows)]
            table.add_row(
                f"{value:g}", *(told([row[route] for row in rows]) for route in ROUTES), f"{(setting.r - 1) ** 0.5:.2f}"
            )
        console.print(table)
    rows = on_testbed(args.testbed, args.n, range(1, args.seeds + 1))
    table = Table(title=f"projection distance on {args.testbed}, {args.n} requests of each side")
    for heading in ("layer", "r", *ROUTES, "sqrt(r - 1)"):
        table.add_column(heading)
    for layer in sorted({row["layer"] for row in rows}):
        own = [row for row in rows if row["layer"] == layer]
        r = own[0]["r"]
        of_routes = (told([row[route] for row in own]) for route in ROUTES)
        table.add_row(str(layer), str(r), *of_routes, f"{(r - 1) ** 0.5:.2f}")
    console.print(table)
    results += [{"sweep": "testbed", **row} for row in rows]
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
