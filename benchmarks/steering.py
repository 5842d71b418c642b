"""Does steering with SAILS' subspace change how often SmolLM2 refuses, and does removing it undo the alignment?

    sails train sft --config recipes/configs/smollm2-135m/sft_sails.yaml --learning_rate 1e-3 --max_train_examples 32 \
        --output_dir runs/sft-sails-smollm2
    python benchmarks/steering.py --aligned runs/sft-sails-smollm2 --output docs/results/steering.json

From this repository's folder; about half an hour on two cores. An interrupted run goes on where it was. Subspaces are
found as the training does, in the same rows: SAILS', and as controls those of random SAE features, of random directions
(as many as SAILS has in the layer with most), and the difference of means. Then

- the first direction of each is added to the base model's hidden states, or subtracted, in strengths that are shares of
  the states' norms;
- each is removed from the hidden states of the aligned model.

Reported are refusal rate, over-refusal rate, and the likeness (ROUGE-L) of answers to harmless prompts with those of
the same model without steering: it tells whether the model still answers as it did. Each with a 95% interval over
prompts.
"""

import argparse
import json
from contextlib import closing
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sails_align.core.artifacts import package_versions
from sails_align.core.files import write_json
from sails_align.evaluation.backends.make import in_process
from sails_align.evaluation.evaluate import evaluate
from sails_align.evaluation.judges.rouge import RougeJudge
from sails_align.evaluation.judges.rules import RulesJudge
from sails_align.evaluation.metrics import estimate
from sails_align.evaluation.records import Item, Sampling
from sails_align.evaluation.result import EvaluationResult
from sails_align.models.resolve import resolve_model
from sails_align.smollm2.requests import named_prompts
from sails_align.steering.hook import Steering
from sails_align.steering.options import SteeringOptions
from sails_align.subspace.basis import Subspace
from sails_align.training import run as align
from sails_align.training.subspace import find_subspace

CONFIG = "recipes/configs/smollm2-135m/sft_sails.yaml"
INITS = ("random_features", "random_basis", "mean_diff")
MAX_NEW_TOKENS = 24


def subspace_of(init: str, n_examples: int, *options: str) -> Subspace:
    """Find a subspace as a training does."""
    with TemporaryDirectory(prefix="sails-steering-") as folder:
        sizes = ("--max_train_examples", str(n_examples), "--output_dir", folder)
        options = ("--config", CONFIG, "--init", init, *sizes, *options)
        args, _ = align.resolved(align.parse("sft", list(options)))
        return find_subspace(args, align.load_source(args, None), Path(folder) / "subspace")


def answers(model: str, n_prompts: int, hook: Steering | None) -> EvaluationResult:
    """Let a model respond to the test prompts, and judge its responses by the rules."""
    prompts, sampling = named_prompts("twins", n_prompts), Sampling(MAX_NEW_TOKENS)
    with closing(in_process(resolve_model(model), "hf", hook=hook)) as backend:
        return evaluate(prompts, backend, {"rules": RulesJudge()}, sampling=sampling, progress=False)


def numbers(result: EvaluationResult, plain: EvaluationResult) -> dict[str, Any]:
    """Return the rates of steered responses, and their likeness to those without steering."""
    rates = result.rates()
    items = [
        Item(prompt, response.text or "", other.text or "")
        for prompt, response, other in zip(result.prompts, result.responses, plain.responses, strict=True)
        if prompt.kind != "harmful"
    ]
    likeness = estimate([verdict.score or 0.0 for _, verdict in RougeJudge().judge("likeness", items)])
    found = {"refusal_rate": rates["refusal_rate"], "over_refusal_rate": rates["over_refusal_rate"]}
    return {name: value.to_json() for name, value in {**found, "likeness": likeness}.items()}


def ranks_of(subspace: Subspace) -> dict[str, int]:
    """Return the number of directions of each layer."""
    return {str(layer): basis_DR.shape[1] for layer, basis_DR in subspace.bases.items()}


def rows_of(output: Path | None, sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a file of the same sizes; none if there is no such file."""
    if output is None or not output.is_file():
        return []
    known = json.loads(output.read_text())
    return known["rows"] if sizes.items() <= known.items() else []


def main() -> None:
    """Print the measurements, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aligned", required=True, help="folder of an aligned model")
    parser.add_argument("--n_examples", type=int, default=32, help="pairs that subspaces are found in")
    parser.add_argument("--n_prompts", type=int, default=32, help="test prompts of each set")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    sails = subspace_of("sails", args.n_examples)
    most = str(max(ranks_of(sails).values()))
    others = {init: subspace_of(init, args.n_examples, "--lora_r", most) for init in INITS}
    subspaces = {"sails": sails, **others}
    sizes = {
        **{name: getattr(args, name) for name in ("aligned", "n_examples", "n_prompts")},
        "ranks": {init: ranks_of(subspace) for init, subspace in subspaces.items()},
        "versions": package_versions(),
    }
    rows = rows_of(args.output, sizes)
    strengths = [signed for strength in args.strengths for signed in (strength, -strength)]
    for model, how, values in (("smollm2", "add", strengths), (args.aligned, "ablate", [1.0])):
        plain = answers(model, args.n_prompts, None)
        for init, strength in ((None, 0.0), *product(subspaces, values)):
            row: dict[str, Any] = {"model": model, "steer": how, "subspace": init, "strength": strength}
            if any(row.items() <= known.items() for known in rows):
                continue
            hook = Steering(SteeringOptions(how, "", strength), subspaces[init]) if init else None
            found = numbers(answers(model, args.n_prompts, hook) if hook else plain, plain)
            rows.append({**row, **found})
            shown = ", ".join(f"{name} {100 * value['value']:.0f}%" for name, value in found.items())
            print(f"{model}, {how} {init} {strength:g}: {shown}", flush=True)
            if args.output:
                write_json(args.output, {**sizes, "rows": rows})


if __name__ == "__main__":
    main()
