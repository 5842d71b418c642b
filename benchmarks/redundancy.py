"""How redundant are the rows of trained adapters: of plain LoRA, with the penalty, from orthonormal starts, of SAILS?

    python benchmarks/redundancy.py --output docs/results/redundancy.json

On the testbed. For each start and seed, an adapter is trained with the recipe's defaults. Then the two halves of the
rows of each lora_A are compared on held-out prompts with their chosen responses: by the linear CKA of what they compute
(`training.losses.redundancy`), and of their weights (as if inputs were white). 0: nothing in common; 1: the same.

Shapes: B batch, S sequence, I inputs of a module, R rank.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sails_align.core.files import write_json
from sails_align.data.tokens import tokenize_response
from sails_align.experiments.methods.entries import METHODS
from sails_align.experiments.summary import mean_of
from sails_align.models.inputs import watched_inputs
from sails_align.models.load import load_model, load_spec_tokenizer
from sails_align.models.resolve import resolve_model
from sails_align.testbed.build import resolve_testbed
from sails_align.testbed.data import alignment_data
from sails_align.training import run as align
from sails_align.training.losses.redundancy import redundancy

STARTS: Mapping[str, tuple[str, ...]] = {
    "LoRA": ("--init", "default"),
    "LoRA, weight 0.01": ("--init", "default", "--loss", "redundancy", "--redundancy_weight", "0.01"),
    "LoRA, weight 0.1": ("--init", "default", "--loss", "redundancy", "--redundancy_weight", "0.1"),
    "LoRA, weight 1": ("--init", "default", "--loss", "redundancy", "--redundancy_weight", "1"),
    "LoRA, orthonormal start": METHODS.get("orthonormal").training,
    "SAILS, no factor frozen": ("--init", "sails", "--subspace_mode", "init", "--layer_map", "nearest"),
}
GROUPS, LENGTH = 2, 128
QUIET = ("--save_strategy", "no", "--disable_tqdm", "true", "--report_to", "none")


def held_out(tokenizer: PreTrainedTokenizerBase, n: int) -> list[Tensor]:
    """Return the tokens of held-out prompts with their chosen responses, of both kinds."""
    world = resolve_testbed("testbed").world
    rows = [row for harmful in (True, False) for row in alignment_data(world, harmful=harmful, n=n, part="validation")]
    sides = [tokenize_response(tokenizer, row["prompt"], row["chosen"], LENGTH) for row in rows]
    return [torch.tensor(side.input_ids) for side in sides]


@torch.no_grad()
def measured(run: Path, n: int) -> dict[str, float]:
    """Return the redundancy of an adapter's features and of its weights, averaged over its modules."""
    spec = resolve_model(str(run))
    model = load_model(spec, "cpu")
    paths = {
        f"{name}.lora_A.default": module.lora_A["default"].weight.float()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and module.lora_A["default"].weight.any()
    }
    inputs: dict[str, list[Tensor]] = {path: [] for path in paths}
    with watched_inputs(model, paths, lambda path, x_BSI: inputs[path].append(x_BSI.flatten(0, 1).float())):
        for ids_S in held_out(load_spec_tokenizer(spec), n):
            model(input_ids=ids_S[None])
    features, weights = [], []
    for path, A_RI in paths.items():
        x_TI = torch.cat(inputs[path])
        features_TR = (x_TI - x_TI.mean(0)) @ A_RI.T
        features.append(redundancy(features_TR.T @ features_TR, GROUPS))
        weights.append(redundancy(A_RI @ A_RI.T, GROUPS))
    return {"features": torch.stack(features).mean().item(), "weights": torch.stack(weights).mean().item()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n_prompts", type=int, default=64, help="held-out prompts of each kind")
    parser.add_argument("--max_steps", type=int, help="of each training; default: the recipe's epochs")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    steps = () if args.max_steps is None else ("--max_steps", str(args.max_steps))
    found = {}
    for name, options in STARTS.items():
        by_seed = []
        for seed in range(args.seeds):
            with TemporaryDirectory() as temporary:
                run = Path(temporary) / "run"
                align.main("sft", [*QUIET, *steps, *options, "--seed", str(seed), "--output_dir", str(run)])
                by_seed.append(measured(run, args.n_prompts))
        found[name] = {
            kind: asdict(mean_of([of[kind] for of in by_seed], (0.0, 1.0))) for kind in ("features", "weights")
        }
        print(name, found[name], flush=True)
    if args.output:
        write_json(args.output, {"seeds": args.seeds, "n_prompts": args.n_prompts, "found": found})


if __name__ == "__main__":
    main()
