"""What the graph penalty of GSAE does to SAEs: reconstruction, and how smooth decoder directions are, on the testbed.

    python benchmarks/graph_saes.py --output docs/results/graph_saes.json

TopK SAEs are trained alike without the penalty, with it, and with a permuted graph, for each layer and some seeds. The
energies of all decoder directions are those of the same graph, which is not permuted. Means over layers and directions,
with 95% intervals over seeds.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sails_align.core.files import write_json
from sails_align.experiments.summary import mean_of
from sails_align.models.load import load_causal_lm, load_tokenizer
from sails_align.saes.graph import prompt_graph
from sails_align.saes.options import SAETrainingOptions
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource
from sails_align.saes.train import train_saes
from sails_align.testbed.build import D_SAE, MODEL_NAME, SAE_LAYERS, SAE_TOKENS, resolve_testbed, sae_rows
from sails_align.testbed.prompts import request_prompts

K, THRESHOLD, WEIGHT = 16, 0.3, 0.03
KINDS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"graph_lambda": 0.0},
    "graph": {"graph_lambda": WEIGHT, "graph_threshold": THRESHOLD},
    "permuted graph": {"graph_lambda": WEIGHT, "graph_threshold": THRESHOLD},  # each seed has its own permutation
}
METRICS: Mapping[str, tuple[float, float]] = {"explained_variance": (0.0, 1.0), "energy": (0.0, 2.0)}
"""With the limits of their values."""


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=list(SAE_LAYERS))
    parser.add_argument("--n_tokens", type=int, default=SAE_TOKENS)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    testbed = resolve_testbed("testbed")
    model, tokenizer = load_causal_lm(testbed.model_path), load_tokenizer(testbed.model_path)
    prompts = [prompt.messages for prompt in request_prompts(testbed, "testbed", None, part="train")]
    options = SAETrainingOptions(d_sae=D_SAE, k=K, n_tokens=args.n_tokens, **KINDS["graph"])
    graph = prompt_graph(model, tokenizer, prompts, args.layers, options)

    def measured(kind: str, seed: int, folder: Path) -> dict[str, float]:
        control = {"graph_control_seed": seed} if kind == "permuted graph" else {}
        reports = train_saes(
            model,
            tokenizer,
            sae_rows(testbed.world, tokenizer),
            args.layers,
            output_dir=folder,
            model_name=MODEL_NAME,
            d_sae=D_SAE,
            k=K,
            n_tokens=args.n_tokens,
            seed=seed,
            progress=False,
            graph_prompts=prompts if KINDS[kind]["graph_lambda"] else None,
            **KINDS[kind],
            **control,
        )
        saes = SAESet.load(SAESource(path=str(folder)), model_config=model.config, model_name=MODEL_NAME)
        energies = [graph.penalties[layer].mean_energy(saes[layer].W_dec_FD) for layer in args.layers]
        explained = [reports[layer].explained_variance for layer in args.layers]
        return {"explained_variance": sum(explained) / len(explained), "energy": sum(energies) / len(energies)}

    found = {}
    with TemporaryDirectory() as temporary:
        for kind in KINDS:
            by_seed = [measured(kind, seed, Path(temporary) / f"{kind}-{seed}") for seed in range(args.seeds)]
            found[kind] = {
                metric: asdict(mean_of([of[metric] for of in by_seed], limits)) for metric, limits in METRICS.items()
            }
            print(kind, found[kind], flush=True)
    if args.output:
        about = {"seeds": args.seeds, "layers": args.layers, "n_tokens": args.n_tokens, "k": K}
        write_json(args.output, {**about, "graph_lambda": WEIGHT, "graph_threshold": THRESHOLD, "found": found})


if __name__ == "__main__":
    main()
