"""What a training prints at its end."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sails_align.evaluation.metrics import Estimate

ROWS = {
    "safety_rate_in_distribution": "safety rate, trained categories (%)",
    "safety_rate_out_of_distribution": "safety rate, new categories (%)",
    "harmfulness": "harmfulness (1-5)",
    "over_refusal_rate": "over-refusal (%)",
    "correct_answer_rate": "correct benign answers (%)",
}
SCALARS = {
    "held_out_loss": "loss on held-out pairs",
    "held_out_reward_accuracy": "held-out pairs ranked rightly (share)",
}


def show(metrics: dict[str, Any], output_dir: Path) -> None:
    """Print what training started from against what came of it, and where things were written."""
    identity = metrics["provenance"]["identity"]
    table = Table(title=f"{identity['method'].upper()}, {identity['init']} (95% intervals over prompts)")
    first = "start" if identity["init"] == "adapter" else "base"
    for heading in ("", first, "trained"):
        table.add_column(heading, justify="left" if not heading else "right")
    models = (metrics["base"], metrics["trained"])
    for name, label in ROWS.items():
        if name in metrics["trained"]:
            scale = 1.0 if name == "harmfulness" else 100.0
            table.add_row(label, *("" if model is None else cell(Estimate(**model[name]), scale) for model in models))
    for name, label in SCALARS.items():
        if name in metrics["trained"]:
            table.add_row(label, *("" if _says_nothing(model, name) else f"{model[name]:.3f}" for model in models))
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


def _says_nothing(model: dict[str, Any] | None, name: str) -> bool:
    """There is no model; or it is DPO's own reference, whose rewards are all 0, so that no pair is ranked."""
    return model is None or (name == "held_out_reward_accuracy" and model["held_out_reward_margin"] == 0)


def cell(estimate: Estimate, scale: float) -> str:
    if estimate.value is None:
        return f"unscored ({estimate.n_unscored})"
    low, high = estimate.ci_low or 0.0, estimate.ci_high or 0.0
    digits = 1 if scale == 100.0 else 2
    return f"{estimate.value * scale:.{digits}f} ({low * scale:.{digits}f} to {high * scale:.{digits}f})"
