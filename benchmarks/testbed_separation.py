"""How well harmful requests can be told from harmless ones in the testbed's base model, layer by layer.

    python benchmarks/testbed_separation.py [--model_name_or_path testbed] [--output FILE.json]

Directions come from the alignment data's requests; AUC is on test requests, of the trained categories and of new ones,
against harmless requests about dual-use objects. Hidden states are those of the last prompt token, where the answer
starts, and the mean over the request's words.

Shapes: N requests, T tokens, D d_model, F d_sae, K features, C categories.
"""

import argparse
import json

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from sails_align.data.tokens import tokenize_prompt
from sails_align.models.hooks import hidden_states_at
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource
from sails_align.testbed.build import resolve_testbed
from sails_align.testbed.world import Request


def states(
    model, tokenizer, requests: list[Request], saes, tokens: str
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By layer, mean hidden state (N, D) and SAE activations (N, F) over the `last` token of each request or `all`."""
    rows: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer: [] for layer in saes}
    for request in requests:
        side = tokenize_prompt(tokenizer, [{"role": "user", "content": request.prompt}], 128, tokens=tokens)
        input_ids = torch.tensor([side.input_ids])
        hidden = hidden_states_at(model, list(saes), input_ids, torch.ones_like(input_ids))
        for layer, sae in saes.items():
            hidden_TD = hidden[layer][0][torch.tensor(side.mask)]
            rows[layer].append((hidden_TD.mean(0), sae.encode(hidden_TD).mean(0)))
    return {layer: tuple(torch.stack(part) for part in zip(*pairs, strict=True)) for layer, pairs in rows.items()}


def auc(positive_N: torch.Tensor, negative_N: torch.Tensor) -> float:
    """Area under the ROC curve of a score that should be higher for the first."""
    labels = np.r_[np.ones(len(positive_N)), np.zeros(len(negative_N))]
    return float(roc_auc_score(labels, torch.cat([positive_N, negative_N]).numpy()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="testbed")
    parser.add_argument("--n", type=int, default=400, help="requests of each set")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()
    testbed = resolve_testbed(args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(testbed.model_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(testbed.model_path)
    saes = SAESet.load(SAESource(path=testbed.sae_path), model_config=model.config, model_name=testbed.model_path)
    layers = list(saes)
    world = testbed.world
    splits = ("train_harmful", "train_benign", "test_harmful", "test_ood", "test_dual_use")
    requests = {split: world.requests(split, args.n) for split in splits}
    results = []
    for tokens in ("last", "all"):
        hidden = {split: states(model, tokenizer, requests[split], saes, tokens) for split in splits}
        for layer in layers:
            results += [{"tokens": tokens, "layer": layer, **row} for row in measure(hidden, requests, layer)]
    show(results)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


def measure(hidden, requests, layer: int) -> list[dict]:
    """One row for each kind of direction."""
    state = {split: values[layer][0] for split, values in hidden.items()}
    acts = {split: values[layer][1] for split, values in hidden.items()}
    harmful_ND, benign_ND = state["train_harmful"], state["train_benign"]
    mean_D = benign_ND.mean(0)
    rows = []

    def add(name: str, scores: dict[str, torch.Tensor]) -> None:
        negative = scores["test_dual_use"]
        trained, new = auc(scores["test_harmful"], negative), auc(scores["test_ood"], negative)
        rows.append({"method": name, "auc_trained": trained, "auc_new": new})

    direction_D = harmful_ND.mean(0) - mean_D
    add("mean difference", {split: values @ direction_D for split, values in state.items()})
    categories = sorted({request.category for request in requests["train_harmful"]})
    own_CD = torch.stack(
        [
            harmful_ND[torch.tensor([r.category == category for r in requests["train_harmful"]])].mean(0) - mean_D
            for category in categories
        ]
    )
    own_CD = torch.nn.functional.normalize(own_CD, dim=1)
    best = {split: ((values - mean_D) @ own_CD.T).max(1).values for split, values in state.items()}
    add("per-category directions, best of", best)
    delta_F = acts["train_harmful"].mean(0) - acts["train_benign"].mean(0)
    top_K = delta_F.abs().topk(16).indices
    weights_K = delta_F[top_K]
    scores = {split: acts[split][:, top_K] @ weights_K for split in acts}
    add("top-16 SAE features, weighted by delta", scores)
    x = torch.cat([harmful_ND, benign_ND]).numpy()
    y = np.r_[np.ones(len(harmful_ND)), np.zeros(len(benign_ND))]
    probe = LogisticRegression(max_iter=2000, C=0.1).fit(x, y)
    add("linear probe", {split: torch.tensor(probe.decision_function(values)) for split, values in state.items()})
    return rows


def show(results: list[dict]) -> None:
    """Print a table."""
    table = Table(title="AUC, harmful against harmless dual-use requests")
    for heading in ("tokens", "layer", "method", "trained categories", "held-out categories"):
        table.add_column(heading)
    for row in results:
        table.add_row(
            row["tokens"], str(row["layer"]), row["method"], f"{row['auc_trained']:.3f}", f"{row['auc_new']:.3f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
