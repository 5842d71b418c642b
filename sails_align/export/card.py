"""Write the model card of a finished run: README.md with the hub's metadata, from what the run directory knows.

The words are in `templates/model_card.md.j2`. What is not known is omitted or called unknown. Of data sets only names,
sizes and hashes enter the card. Values from files are numbers, or stand in code spans, where Markdown and HTML have no
effect.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from sails_align.core.errors import InputError
from sails_align.core.files import write_text
from sails_align.evaluation.backends.serving import serve_command, serving_report
from sails_align.evaluation.metrics import METRICS, Estimate, Metric
from sails_align.export.card_facts import Facts, code, hub_id, number, public_name, read_facts
from sails_align.initializers import INITIALIZERS, subspace_initializers
from sails_align.models.adapters import load_base_config, read_adapter
from sails_align.models.load import exact_attention

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"
SAILS_OPTIONS = (
    *("preset", "contrast", "prompt_tokens", "score", "top_k", "weighting", "center", "tau", "benign_whitening"),
    *("layer_map", "fold_norm", "init_scale", "subspace_mode"),
)
TRAINING_OPTIONS = (
    *("max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "optim", "seed"),
)
DATA = {"safety": "harmful requests", "helpful": "harmless requests", "train": "training", "held_out": "held out"}
N_FEATURES = 5
"""Features of a layer that are shown."""
RATES = (
    *("safety_rate", "safety_rate_in_distribution", "safety_rate_out_of_distribution", "harmfulness"),
    *("high_risk_rate", "over_refusal_rate", "correct_answer_rate"),
)
LOSSES = ("held_out_loss", "held_out_reward_accuracy", "held_out_reward_margin")
WANTED = ("safety_rate", "over_refusal_rate", "correct_answer_rate", "attack_success_rate", "capability")
"""Metrics that a card names if they were not measured."""
LIMITS = {
    "safety_rate_out_of_distribution": "Harmful requests of held-out categories were answered safely in",
    "over_refusal_rate": "Harmless requests were refused in",
}


def write_card(run: Path, folder: Path, *, merged: bool = False) -> Path:
    """Write the model card of a run beside its adapter, or beside the merged model. Returns its path.

    Args:
        run: directory with run.json, metrics.json, adapter_config.json and subspace/, or some of them.
        folder: of the new README.md.
        merged: whether the folder holds the merged model.

    Raises:
        InputError: if one of the files is damaged.
    """
    facts = read_facts(run, merged=merged)
    try:
        template = TEMPLATE.read_text(encoding="utf-8")
        card = ModelCard.from_template(_metadata(facts), template_str=template, **_values(facts, run))
    except InputError:
        raise
    except (AttributeError, TypeError, KeyError, ValueError, jinja2.TemplateError) as error:
        raise InputError(
            f"the files in {run} are not as a run writes them ({error}); copy the folder again, or train again"
        ) from error
    path = folder / "README.md"
    write_text(path, re.sub(r"\n{3,}", "\n\n", str(card)) + "\n")
    return path


def _metadata(facts: Facts) -> ModelCardData:
    """Return what the hub reads. It takes only its own ids for models and data sets, so local ones are omitted."""
    datasets = (facts.options("script").get("dataset_name"), facts.options("data").get("helpful_dataset_name"))
    tags = ["safety", "alignment", "trl", facts.method, "lora" if facts.adapter else "full-fine-tuning"]
    if facts.identity.get("init") == "sails":
        tags += ["sails", "sparse-autoencoder"]
    relation = "adapter" if facts.kind == "adapter" else "finetune"
    return ModelCardData(
        base_model=facts.base_on_hub,
        base_model_relation=relation if facts.base_on_hub else None,
        library_name="peft" if facts.kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        license=facts.license(),
        tags=[tag for tag in tags if tag],
        datasets=[name for name in map(hub_id, datasets) if name] or None,
    )


def _values(facts: Facts, run: Path) -> dict[str, Any]:
    """Return what the template shows; all rows are Markdown."""
    init, trained = facts.identity.get("init"), facts.metrics.get("trained") or {}
    base_config, commit = _base_config(facts, run), (facts.record.get("git") or {}).get("commit")
    return {
        "facts": facts,
        "code": code,
        "init": init,
        "init_summary": INITIALIZERS.get(str(init)).summary if init in INITIALIZERS else None,
        "is_baseline": init in subspace_initializers() and init != "sails",
        "options": [(name, code(value)) for name, value in _options(facts) if value not in (None, "", [], {})],
        "data": list(_data(facts)),
        "left_out": list(_left_out(facts)),
        "layers": list(_layers(facts)),
        "features": list(_features(facts)),
        "n_features": N_FEATURES,
        "trained": trained,
        "rates": list(_rates(facts)),
        "losses": list(_losses(facts)),
        "measured_limits": list(_limits(trained)),
        "not_measured": [METRICS[name].label for name in WANTED if name not in trained],
        "needs_eager": base_config is not None and exact_attention(base_config) == "eager",
        "vllm": _vllm(facts, run, base_config),
        "licence": facts.license(),
        "versions": {**facts.record.get("versions", {}), "commit of sails-align": commit},
    }


def _options(facts: Facts) -> Iterator[tuple[str, Any]]:
    sails, training = facts.options("sails") if facts.subspace else {}, facts.options("training")
    for name in SAILS_OPTIONS:
        yield name, sails.get(name)
    if sails.get("subspace_mode") == "decay":
        yield "subspace_decay", facts.options("callbacks").get("subspace_decay")
    if facts.adapter:
        modules = facts.adapter.get("target_modules")
        n_modules = len(modules) if isinstance(modules, list) else 1
        yield "rank", facts.adapter.get("r")
        yield "alpha", facts.adapter.get("lora_alpha")
        yield "adapted modules", f"{n_modules} modules" if n_modules > 12 else _joined(modules)
        yield "layers", _joined(facts.adapter.get("layers_to_transform")) or (None if n_modules > 12 else "all")
    length = "max_steps" if (training.get("max_steps") or -1) > 0 else "num_train_epochs"
    for name in ("learning_rate", "lr_scheduler_type", "warmup_steps", length, *TRAINING_OPTIONS):
        yield name, training.get(name)
    for name in ("beta", "loss_type") if facts.method == "dpo" else ():
        yield name, training.get(name)
    yield "reference model", public_name(facts.options("dpo").get("ref_model_name_or_path"))
    for name in ("engine", "n_processes", "dtype"):
        yield name, facts.identity.get(name)


def _joined(names: Any) -> Any:
    return ", ".join(sorted(map(str, names))) if isinstance(names, list) else names


def _data(facts: Facts) -> Iterator[tuple[str, str, str, str]]:
    for part, label in DATA.items():
        found = facts.record.get("data", {}).get(part, {})
        if found.get("rows"):
            sha256 = code(found["sha256"]) if "sha256" in found else ""
            yield label, _data_name(facts, part, found.get("name")), number(found["rows"], "d"), sha256


def _data_name(facts: Facts, part: str, name: Any) -> str:
    if part not in ("safety", "helpful"):
        return ""
    if facts.on_testbed:
        return "the testbed's requests"
    if part == "safety":
        script = facts.options("script")
        details = (script.get("dataset_config"), script.get("dataset_train_split"))
    else:
        data = facts.options("data")
        details = (data.get("helpful_dataset_config"), data.get("helpful_dataset_split"))
    return code(" ".join([str(public_name(name)), *(str(word) for word in details if word)]))


def _left_out(facts: Facts) -> Iterator[tuple[str, str]]:
    longer = facts.metrics.get("provenance", {}).get("longer_than_max_length", {})
    causes = dict(facts.record.get("data", {}).get("dropped_rows", {}))
    causes |= {f"{part}, longer than max_length": n for part, n in longer.items()}
    for cause, n in causes.items():
        if n:
            yield code(cause), number(n, "d")


def _layers(facts: Facts) -> Iterator[tuple[str, str, str, str]]:
    for layer, values in facts.subspace.get("layers", {}).items():
        sae = facts.subspace.get("saes", {}).get(layer, {})
        named = f"{public_name(sae['source'])}, sha256 {str(sae.get('sha256'))[:12]}" if sae.get("source") else "none"
        kept = number(values.get("variance_kept"), ".0%") if "features" in facts.subspace else "-"
        yield code(layer), number(values.get("n_directions"), "d"), kept, code(named)


def _features(facts: Facts) -> Iterator[tuple[str, ...]]:
    for layer, of_layer in facts.subspace.get("features", {}).get("layers", {}).items():
        columns = [of_layer.get(name, []) for name in ("ids", "delta", "score", "rate_aligned", "rate_unaligned")]
        for feature, delta, score, *rates in list(zip(*columns, strict=False))[:N_FEATURES]:
            shares = (number(rate, ".1%") for rate in rates)
            yield code(layer), number(feature, "d"), number(delta, "+.3f"), number(score, ".3f"), *shares


def _rates(facts: Facts) -> Iterator[tuple[str, str, str]]:
    base, trained = (facts.metrics.get(name) or {} for name in ("base", "trained"))
    for metric in (METRICS[name] for name in RATES):
        if isinstance(trained.get(metric.name), dict):
            yield metric.heading, _rate(base.get(metric.name), metric), _rate(trained[metric.name], metric)


def _rate(value: Any, metric: Metric) -> str:
    if not isinstance(value, dict):
        return "not measured"
    rate = Estimate(**value)
    counts = f"n = {rate.n:d}" + (f", {rate.n_unscored:d} unscored" if rate.n_unscored else "")
    if rate.value is None:
        return f"unscored ({counts})"
    return f"{metric.text(rate.value)} ({metric.text(rate.ci_low)} to {metric.text(rate.ci_high)}; {counts})"


def _losses(facts: Facts) -> Iterator[tuple[str, str, str]]:
    models = [facts.metrics.get(name) or {} for name in ("base", "trained")]
    for metric in (METRICS[name] for name in LOSSES if name in models[1]):
        base, trained = (number(model.get(metric.name), ".3f") if model else "not measured" for model in models)
        yield metric.heading, base, trained


def _limits(trained: dict[str, Any]) -> Iterator[str]:
    for name, words in LIMITS.items():
        rate = trained.get(name)
        if isinstance(rate, dict) and rate.get("value") is not None:
            yield f"{words} {number(rate['value'], '.1%')} of cases (n = {number(rate.get('n'), 'd')})."


def _base_config(facts: Facts, run: Path) -> PreTrainedConfig | None:
    """Return the base model's configuration; None if it is not here any more, which the card can do without."""
    try:
        return load_base_config(read_adapter(run))[1] if facts.adapter else None
    except InputError:
        return None


def _vllm(facts: Facts, run: Path, base_config: PreTrainedConfig | None) -> str:
    """Return the command that serves the model, or what to do first."""
    if facts.kind != "adapter":
        return "vllm serve PATH"
    if base_config is None:
        return "# run: sails check-adapter PATH"
    blocking = [problem.what for problem in serving_report(run, base_config) if problem.blocking]
    if blocking:
        return f"# not as it is: {code(blocking[0])[1:-1]};\n# merge it first: sails merge PATH --output MERGED"
    return serve_command(read_adapter(run), facts.base_on_hub or "BASE_MODEL", "PATH")
