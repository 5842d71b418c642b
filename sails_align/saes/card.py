"""Write the card of a trained SAE: what it was trained on, with which options, and how good it is."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sails_align.core.text import code_span
from sails_align.saes.algorithms import ALGORITHMS
from sails_align.saes.options import SAETrainingOptions

CARD = "README.md"
QUALITY = {
    "explained_variance": "explained variance",
    "explained_variance_typical": "without tokens of massive activations",
    "l0": "active latents at a token",
    "dead_fraction": "share of dead latents",
    "loss_recovered": "loss recovered",
    "graph_energy": "mean energy of the decoder on its graph",
}
"""Of a report, with the words of the card."""


def card_of(report: Mapping[str, Any], options: SAETrainingOptions, metadata: Mapping[str, Any]) -> str:
    """Return the card of an SAE in Markdown, from its report (JSON-able), options and metadata."""
    used = {name: value for name, value in asdict(options).items() if name not in options.unused}
    measured = {words: f"{report[name]:.4g}" for name, words in QUALITY.items() if report[name] is not None}
    text = f" on {code_span(metadata['dataset_path'])}" if metadata["dataset_path"] else ""
    lines = [
        f"# SAE of layer {report['layer']} of {code_span(metadata['model_name'])}",
        "",
        f"A sparse autoencoder of the output of block {report['layer']} (from 0), in sae-lens' format, trained by "
        f"`sails train-sae`{text}.",
        f"Architecture `{options.architecture}`: {ALGORITHMS.get(options.architecture).summary}",
        *([_graph(report, metadata["graph"])] if "graph" in metadata else []),
        "",
        *_table(("option", "value"), {code_span(name): code_span(value) for name, value in used.items()}),
        "",
        *_table((f"on {report['eval_tokens']:,} held-out tokens", ""), measured),
    ]
    return "\n".join(lines) + "\n"


def _graph(report: Mapping[str, Any], graph: Mapping[str, Any]) -> str:
    seed = graph["control_seed"]
    control = "" if seed is None else f" This is a control: its coordinates were permuted at random (seed {seed})."
    return (
        f"Its decoder was trained with a graph penalty (arXiv 2512.06655) of weight {graph['lambda']:g}. The graph has "
        f"{report['graph_edges']:,} edges: pairs of coordinates with a correlation of {graph['threshold']:g} or more "
        f"at the last tokens of {graph['n_prompts']:,} prompts. {report['graph_isolated']:,} coordinates have no "
        f"neighbour.{control}"
    )


def _table(heading: tuple[str, str], rows: Mapping[str, str]) -> list[str]:
    return [f"| {heading[0]} | {heading[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
