"""How a run was made and what was measured, as sections of the model card."""

from pathlib import Path
from typing import Any

from sails_align.export.card_facts import Facts, code, hub_id, named_rows, number, table

METHODS = {"sft": "supervised fine-tuning (SFT)", "dpo": "direct preference optimisation (DPO)"}
INITIALIZATIONS = {
    "sails": "in a safety subspace, found by sparse autoencoders (SAILS)",
    "random_basis": "in a random subspace (a baseline)",
    "random_features": "in the span of random features of sparse autoencoders (a baseline)",
    "activation_pca": "in the principal directions of activations (a baseline)",
    "mean_diff": "in the difference of mean activations (a baseline)",
    "default": "as in plain LoRA",
    "adapter": "from a trained adapter",
    "full": "from all weights of the base model",
}
PARTS = {"safety": "harmful requests", "helpful": "harmless requests", "train": "training", "held_out": "held out"}
SHOWN_FEATURES = 5
RATES = {
    "safety_rate": "safety rate",
    "safety_rate_in_distribution": "safety rate, trained categories",
    "safety_rate_out_of_distribution": "safety rate, held-out categories",
    "harmfulness": "harmfulness (1 to 5)",
    "high_risk_rate": "high-risk responses",
    "over_refusal_rate": "harmless requests refused",
    "correct_answer_rate": "correct answers to harmless requests",
}
SCALARS = {
    "held_out_loss": "loss on held-out pairs",
    "held_out_reward_accuracy": "held-out pairs ranked correctly (share)",
    "held_out_reward_margin": "reward margin on held-out pairs",
}


def method(facts: Facts) -> str:
    """What was trained, from where, and how."""
    start = facts.identity.get("init")
    sails = facts.options.get("sails", {}) if facts.subspace else {}
    names = ("preset", "contrast", "prompt_tokens", "score", "top_k", "weighting", "center", "tau")
    names += ("benign_whitening", "layer_map")
    rows = {name: sails.get(name) for name in (*names, "fold_norm", "init_scale", "subspace_mode")}
    if sails.get("subspace_mode") == "decay":
        rows["subspace_decay"] = facts.option("callbacks", "subspace_decay") or sails.get("subspace_decay")
    if facts.adapter:
        modules = facts.adapter.get("target_modules")
        many = isinstance(modules, list) and len(modules) > 12
        rows |= {
            "rank": facts.adapter.get("r"),
            "alpha": facts.adapter.get("lora_alpha"),
            "adapted modules": f"{len(modules)} modules" if many else _joined(modules),  # pyright: ignore[reportArgumentType]
            "layers": _joined(facts.adapter.get("layers_to_transform")) or (None if many else "all"),
        }
    training = facts.options.get("training", {})
    length = "max_steps" if (training.get("max_steps") or -1) > 0 else "num_train_epochs"
    wanted = ("learning_rate", "lr_scheduler_type", "warmup_steps", length, "max_length")
    wanted += ("per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "optim", "seed")
    wanted += ("beta", "loss_type") if facts.method == "dpo" else ()
    rows |= {name: training.get(name) for name in wanted}
    reference = facts.option("dpo", "ref_model_name_or_path")
    rows["reference model"] = hub_id(reference) or (Path(str(reference)).name if reference else None)
    rows |= {name: facts.identity.get(name) for name in ("engine", "n_processes", "dtype")}
    done = METHODS.get(str(facts.method), "fine-tuning")
    how = INITIALIZATIONS.get(str(start), f"by {code(start)}")
    subject = "Training starts" if start in ("adapter", "full") else "The adapter is initialized"
    told = f" {subject} {how}." if start else ""
    return f"## Method\n\nTrained by {done} with TRL.{told}\n\n{table(['option', 'value'], named_rows(rows))}"


def _joined(names: Any) -> str | None:
    return ", ".join(sorted(map(str, names))) if isinstance(names, list) else names


def data(facts: Facts) -> str:
    """Names, sizes and hashes of the data, and what was left out of it."""
    known = facts.record.get("data")
    if not known:
        return "## Data\n\nUnknown: there is no run.json of a finished run."
    rows = []
    for part, label in PARTS.items():
        found = known.get(part, {})
        if found.get("rows"):
            name = "the testbed's requests" if facts.on_testbed else _data_name(facts, part, found.get("name"))
            sha256 = code(found["sha256"]) if "sha256" in found else ""
            rows.append((label, name if part in ("safety", "helpful") else "", number(found["rows"], "d"), sha256))
    causes = dict(known.get("dropped_rows", {}))
    longer = facts.metrics.get("provenance", {}).get("longer_than_max_length", {})
    causes |= {f"{part}, longer than max_length": n for part, n in longer.items()}
    left_out = [(code(cause), number(n, "d")) for cause, n in causes.items() if n]
    told = table(["left out", "rows"], left_out) if left_out else "No rows were left out." * bool(facts.metrics)
    text = f"## Data\n\n{table(['', 'name', 'examples', 'sha256'], rows)}\n\n{told}"
    return text + "\n\nThe testbed is a small synthetic world that ships with sails-align." * facts.on_testbed


def _data_name(facts: Facts, part: str, name: Any) -> str:
    options, prefix = ("script", "dataset") if part == "safety" else ("data", "helpful_dataset")
    split = "dataset_train_split" if part == "safety" else "helpful_dataset_split"
    more = (facts.option(options, f"{prefix}_config"), facts.option(options, split))
    return code(" ".join([hub_id(name) or Path(str(name)).name, *(str(word) for word in more if word)]))


def subspace(facts: Facts) -> str:
    """The layers of the subspace, and the features it is made of."""
    found = facts.subspace
    if not found:
        return ""
    features = found.get("features", {}).get("layers", {})
    rows, best = [], []
    for layer, values in found.get("layers", {}).items():
        sae = found.get("saes", {}).get(layer, {})
        source = str(sae.get("source", ""))
        named = f"{hub_id(source) or Path(source).name}, sha256 {str(sae.get('sha256'))[:12]}" if source else "none"
        kept = number(values.get("variance_kept"), ".0%") if features else "-"
        rows.append((code(layer), number(values.get("n_directions"), "d"), kept, code(named)))
        of = features.get(layer, {})
        lists = [of.get(name, []) for name in ("ids", "delta", "score", "rate_aligned", "rate_unaligned")]
        for feature, delta, score, *rates in list(zip(*lists, strict=False))[:SHOWN_FEATURES]:
            cells = (number(delta, "+.3f"), number(score, ".3f"), *(number(rate, ".1%") for rate in rates))
            best.append((code(layer), number(feature, "d"), *cells))
    text = f"## Subspace\n\nFound by {code(found.get('method'))}; layer l is the output of block l.\n\n"
    text += table(["layer", "directions", "variance kept", "sparse autoencoder"], rows)
    if best:
        text += (
            f"\n\nThe table lists the {SHOWN_FEATURES} features of each layer with the highest score. Delta is the "
            "difference of mean activations, aligned side minus unaligned side. Active is the share of tokens.\n\n"
        )
        text += table(["layer", "feature", "delta", "score", "active, aligned", "active, unaligned"], best)
    return text


def metrics(facts: Facts) -> str:
    """Base against trained, with what each number is a mean of."""
    base, trained = (facts.metrics.get(name) or {} for name in ("base", "trained"))
    if not trained:
        return "## Evaluation results\n\nNone: there is no metrics.json."
    rows = []
    for name, label in RATES.items():
        if isinstance(trained.get(name), dict):
            scale = "" if name == "harmfulness" else "%"
            rows.append((label, _estimate(base.get(name), scale), _estimate(trained[name], scale)))
    for name, label in SCALARS.items():
        if name in trained:
            rows.append((label, *(number(m.get(name), ".3f") if m else "not measured" for m in (base, trained))))
    first = "initial" if facts.identity.get("init") == "adapter" else "base"
    intervals = (
        "Intervals are 95% bootstrap intervals over n prompts. Unscored responses are counted, never guessed.\n\n"
    )
    told = intervals * any(name in trained for name in RATES)
    judge = "The testbed's oracle judged the responses from ground truth.\n\n" if "safety_rate" in trained else (
        "Safety was not measured, because that needs a judge. The loss measures how well the held-out responses are "
        "predicted.\n\n"
    )  # fmt: skip
    return f"## Evaluation results\n\n{told}{judge}{table(['', first, 'trained'], rows)}"


def _estimate(value: Any, scale: str) -> str:
    if not isinstance(value, dict):
        return "not measured"
    n, unscored = number(value.get("n"), "d"), value.get("n_unscored")
    counts = f"n = {n}" + (f", {number(unscored, 'd')} unscored" if unscored else "")
    if value.get("value") is None:
        return f"unscored ({counts})"
    form = ".1%" if scale else ".2f"
    middle, low, high = (number(value.get(name), form) for name in ("value", "ci_low", "ci_high"))
    return f"{middle} ({low} to {high}; {counts})"
