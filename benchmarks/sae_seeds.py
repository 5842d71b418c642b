"""Do SAEs of two seeds give the same SAILS subspace? GBA SAEs against TopK SAEs of the same L0, on the testbed.

    python benchmarks/sae_seeds.py --output docs/results/sae_seeds.json

For each layer, GBA SAEs of two seeds are trained, then TopK SAEs of the same seeds with k = their mean L0, rounded.
Text and data are the same for all. Reported are

- the principal angles between the two subspaces that `discover` finds with the SAEs of the two seeds (degrees; of
  subspaces of different ranks, as many as the smaller one has directions), and those between random subspaces of the
  same ranks;
- the mean maximal cosine similarity of decoder directions of one seed with those of the other.

Shapes: D d_model, R rank, F d_sae.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from sails_align.core.files import write_json
from sails_align.core.linalg import orthonormalize, principal_angles
from sails_align.initializers.discover import discover
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource
from sails_align.saes.train import SAEReport, train_saes
from sails_align.testbed.build import D_SAE, MODEL_NAME, SAE_TOKENS, resolve_testbed, sae_rows
from sails_align.testbed.data import alignment_data

SEEDS = (1, 2)
N_RANDOM = 100
"""Pairs of random subspaces."""


def degrees(first_DR: Tensor, second_DR: Tensor) -> list[float]:
    """Return the principal angles between two bases."""
    return torch.rad2deg(principal_angles(first_DR, second_DR)).tolist()


def random_angle(d_model: int, ranks: tuple[int, int]) -> float:
    """Return the mean principal angle between random subspaces."""
    generator = torch.Generator().manual_seed(0)
    pairs = [
        [orthonormalize(torch.randn(d_model, rank, generator=generator).double()) for rank in ranks]
        for _ in range(N_RANDOM)
    ]
    return mean([mean(degrees(*pair)) for pair in pairs])


def mean(values: list[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def similarity(first_FD: Tensor, second_FD: Tensor) -> float:
    """Return the mean, over latents of both, of the largest cosine with a latent of the other."""
    cosines_FF = normalize(first_FD, dim=1) @ normalize(second_FD, dim=1).T
    return (cosines_FF.amax(0).mean() + cosines_FF.amax(1).mean()).item() / 2


class Setting:
    """The testbed, and SAEs of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        testbed = resolve_testbed("testbed")
        self.args, self.world, self.name = args, testbed.world, testbed.model_path
        self.model = AutoModelForCausalLM.from_pretrained(testbed.model_path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(testbed.model_path)
        self.harmful, self.harmless = (
            alignment_data(self.world, harmful=harmful, n=args.n_examples) for harmful in (True, False)
        )

    def trained(self, layer: int, folder: Path, **options: Any) -> tuple[SAEReport, SAESet]:
        """Train an SAE."""
        report = train_saes(
            self.model,
            self.tokenizer,
            sae_rows(self.world, self.tokenizer),
            [layer],
            output_dir=folder,
            model_name=MODEL_NAME,
            d_sae=self.args.d_sae,
            n_tokens=self.args.n_tokens,
            **options,
        )[layer]
        return report, SAESet.load(SAESource(path=str(folder)), model_config=self.model.config, model_name=MODEL_NAME)

    def both_seeds(self, layer: int, folder: Path, **options: Any) -> dict[str, Any]:
        """Train an SAE with each seed; return how good they are and how alike they and their subspaces are."""
        found = [self.trained(layer, folder / str(seed), seed=seed, **options) for seed in SEEDS]
        bases = [
            discover(self.model, self.tokenizer, saes, self.harmful, self.harmless).bases[layer] for _, saes in found
        ]
        angles, ranks = degrees(*bases), (bases[0].shape[1], bases[1].shape[1])
        return {
            "l0": [report.l0 for report, _ in found],
            "explained_variance": [report.explained_variance for report, _ in found],
            "dead_fraction": [report.dead_fraction for report, _ in found],
            "similarity": similarity(*(saes[layer].W_dec_FD for _, saes in found)),
            "ranks": ranks,
            "angles": angles,
            "mean_angle": mean(angles),
            "mean_angle_of_random": random_angle(len(bases[0]), ranks),
        }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--k", type=int, default=24, help="of the GBA SAEs: the mean of their target frequencies")
    parser.add_argument("--gba_gamma", type=float, default=0.02)
    parser.add_argument("--d_sae", type=int, default=D_SAE)
    parser.add_argument("--n_tokens", type=int, default=SAE_TOKENS)
    parser.add_argument("--n_examples", type=int, default=512, help="pairs of each side that subspaces are found with")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    setting, layers = Setting(args), {}
    for layer in args.layers:
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            gba = setting.both_seeds(layer, folder / "gba", architecture="gba", k=args.k, gba_gamma=args.gba_gamma)
            topk = setting.both_seeds(layer, folder / "topk", k=max(1, round(mean(gba["l0"]))))
        layers[layer] = {"gba": gba, "topk": topk}
        for name, of in layers[layer].items():
            print(
                f"layer {layer}, {name}: L0 {mean(of['l0']):.1f}, mean angle {of['mean_angle']:.1f} degrees (random "
                f"{of['mean_angle_of_random']:.1f}), similarity {of['similarity']:.3f}",
                flush=True,
            )
    if args.output:
        options = {name: value for name, value in vars(args).items() if name != "output"}
        write_json(args.output, {"options": options, "layers": layers})


if __name__ == "__main__":
    main()
