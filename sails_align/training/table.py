"""Print what a training changed, and where its results are."""

from pathlib import Path
from typing import Any

from sails_align.core.log import show
from sails_align.core.tables import FittedTable
from sails_align.evaluation.metrics import METRICS, Estimate
from sails_align.models import clade
from sails_align.models.adapters import WEIGHTS

ESTIMATES = (
    *("safety_rate_in_distribution", "safety_rate_out_of_distribution"),
    *("refusal_rate", "harmfulness", "over_refusal_rate", "correct_answer_rate"),
)
SCALARS = ("held_out_loss", "held_out_reward_accuracy")


def show_changes(title: str, metrics: dict[str, Any], output_dir: Path) -> None:
    """Print the metrics of the models of a training side by side, what it cost, and where its results are."""
    identity, cost = metrics["provenance"]["identity"], metrics["cost"]
    labels = {"base": "initialization" if identity.get("init") == "adapter" else "base", "warm_start": "warm start"}
    models = {name: metrics[name] for name in ("base", "warm_start", "trained") if name in metrics}
    table = FittedTable(f"{title} (95% intervals over prompts)", ("", *(labels.get(name, name) for name in models)))
    for name in (name for name in (*ESTIMATES, *SCALARS) if name in metrics["trained"]):
        table.add_row(METRICS[name].heading, *(_cell(model, name) for model in models.values()))
    if "trainable_parameters" in cost:
        share = f"{cost['trainable_parameters']:,} ({cost['trainable_share']:.2%})"
        table.add_row("trainable parameters", "0", share)
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in cost["seconds"].items())
    table.add_row("seconds", *[""] * (len(models) - 1), f"{sum(cost['seconds'].values()):.0f} ({stages})")
    init = identity.get("init", "full")
    written = {"model": ""} if init == "full" else {"adapter": WEIGHTS if init != "clade" else clade.WEIGHTS}
    written |= {"subspace": "subspace/"} if identity.get("subspace") else {}
    files = {**written, "metrics": "metrics.json"}
    show(table, *(f"{label:<9} {output_dir}/{file}" for label, file in files.items()))


def _cell(model: dict[str, Any] | None, name: str) -> str:
    """Return a metric of a model as text; empty where it was not measured."""
    # DPO's own reference has rewards that are all 0, so that it ranks no pair.
    if model is None or (name == "held_out_reward_accuracy" and model["held_out_reward_margin"] == 0):
        return ""
    metric = METRICS[name]
    return metric.with_interval(Estimate(**model[name])) if name in ESTIMATES else metric.text(model[name])
