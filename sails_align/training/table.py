"""What a training prints at its end."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sails_align.evaluation.metrics import METRICS, Estimate

ESTIMATES = (
    *("safety_rate_in_distribution", "safety_rate_out_of_distribution"),
    *("harmfulness", "over_refusal_rate", "correct_answer_rate"),
)
SCALARS = ("held_out_loss", "held_out_reward_accuracy")


def show(metrics: dict[str, Any], output_dir: Path) -> None:
    """Print what training started from against what came of it, and where things were written."""
    identity = metrics["provenance"]["identity"]
    table = Table(title=f"{identity['method'].upper()}, {identity['init']} (95% intervals over prompts)")
    first = "start" if identity["init"] == "adapter" else "base"
    for heading in ("", first, "trained"):
        table.add_column(heading, justify="left" if not heading else "right")
    models = (metrics["base"], metrics["trained"])
    for metric in (METRICS[name] for name in ESTIMATES if name in metrics["trained"]):
        cells = ("" if model is None else metric.with_interval(Estimate(**model[metric.name])) for model in models)
        table.add_row(metric.heading, *cells)
    for metric in (METRICS[name] for name in SCALARS if name in metrics["trained"]):
        cells = ("" if _says_nothing(model, metric.name) else metric.text(model[metric.name]) for model in models)
        table.add_row(metric.heading, *cells)
    cost = metrics["cost"]
    share = f"{cost['trainable_parameters']:,} ({cost['trainable_share']:.2%})"
    table.add_row("trainable parameters", "0", share)
    seconds = cost["seconds"]
    table.add_row(
        "seconds", "", f"{sum(seconds.values()):.0f} (" + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()) + ")"
    )
    console = Console()
    console.print(table)
    if identity["init"] == "full":
        console.print(f"model     {output_dir}/", highlight=False)
    else:
        console.print(f"adapter   {output_dir}/adapter_model.safetensors", highlight=False)
    if identity["subspace"] is not None:
        console.print(f"subspace  {output_dir}/subspace/", highlight=False)
    console.print(f"metrics   {output_dir}/metrics.json", highlight=False)


def _says_nothing(model: Any, name: str) -> bool:
    """There is no model; or it is DPO's own reference, whose rewards are all 0, so that no pair is ranked."""
    return model is None or (name == "held_out_reward_accuracy" and model["held_out_reward_margin"] == 0)
