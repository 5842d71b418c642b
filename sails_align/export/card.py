"""Write the model card of a finished run: README.md with the hub's metadata, from what the run directory knows.

The words are in `templates/model_card.md.j2`. What is not known is omitted or called unknown. Of data sets only names,
sizes and hashes enter the card. Values from files are numbers, or stand in code spans, where Markdown and HTML have no
effect.
"""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from sails_align.core.errors import InputError
from sails_align.core.files import write_text
from sails_align.core.text import code_span
from sails_align.edits.apply import EDIT_FILE
from sails_align.edits.options import DATASETS, MODELS
from sails_align.evaluation.backends.serving import serve_command, serving_report
from sails_align.evaluation.metrics import METRICS
from sails_align.export.card_facts import Facts, hub_id, number, public_name, read_facts
from sails_align.initializers import INITIALIZERS, subspace_initializers
from sails_align.models.adapters import load_base_config, read_adapter, read_json
from sails_align.models.clade import read_config
from sails_align.models.load import exact_attention

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"
SAILS_OPTIONS = (
    *("preset", "contrast", "prompt_tokens", "score", "top_k", "weighting", "center", "tau", "benign_whitening"),
    *("layer_map", "fold_norm", "init_scale", "subspace_mode"),
)
TRAINING_OPTIONS = (
    *("max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "optim", "seed"),
)


def write_card(run: Path, folder: Path, *, merged: bool = False, base_model: str | None = None) -> Path:
    """Write the model card of a run beside its adapter, or beside the merged or edited model. Returns its path.

    Args:
        run: directory with run.json, metrics.json, adapter_config.json and subspace/, or some of them.
        folder: of the new README.md.
        merged: whether the folder holds the whole model, though the run has an adapter.
        base_model: name of the model, if the folder does not say it.

    Raises:
        InputError: if one of the files is damaged.
    """
    facts = read_facts(run, merged=merged, base_model=base_model)
    try:
        template = TEMPLATE.read_text(encoding="utf-8")
        card = ModelCard.from_template(_metadata(facts), template_str=template, **_values(facts, run, folder))
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
    trained = "clade" if facts.kind == "clade" else "lora" if facts.adapter else "full-fine-tuning"
    tags = ["safety", "alignment", "trl", facts.method, trained]
    if facts.identity.get("init") == "sails":
        tags += ["sails", "sparse-autoencoder"]
    relation = "adapter" if facts.kind in ("adapter", "clade") else "finetune"
    return ModelCardData(
        base_model=facts.base_on_hub,
        base_model_relation=relation if facts.base_on_hub else None,
        library_name="peft" if facts.kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        license=facts.license(),
        tags=[tag for tag in tags if tag],
        datasets=[name for name in map(hub_id, datasets) if name] or None,
    )


def _values(facts: Facts, run: Path, folder: Path) -> dict[str, Any]:
    """Return what the template shows."""
    init, base_config = facts.identity.get("init"), _base_config(facts, run)
    commit = (facts.record.get("git") or {}).get("commit")
    left_out = dict(facts.record.get("data", {}).get("dropped_rows", {}))
    longer = facts.metrics.get("provenance", {}).get("longer_than_max_length", {})
    left_out |= {f"{part}, longer than max_length": n for part, n in longer.items()}
    return {
        **{"facts": facts, "code": code_span, "number": number, "public_name": public_name, "METRICS": METRICS},
        **_edit(folder),
        "init_summary": INITIALIZERS.get(str(init)).summary if init in INITIALIZERS else None,
        "is_baseline": init in subspace_initializers() and init != "sails",
        "options": list(_options(facts, run)),
        "left_out": {cause: n for cause, n in left_out.items() if n},
        "needs_eager": base_config is not None and exact_attention(base_config) == "eager",
        "vllm": _vllm(facts, run, base_config),
        "licence": facts.license(),
        "versions": {**facts.record.get("versions", {}), "commit of sails-align": commit},
    }


def _edit(folder: Path) -> dict[str, Any]:
    """Return what an edit recorded of itself, and its options with names of models and data in place of paths."""
    edited = read_json(folder / EDIT_FILE)
    options = {name: value for name, value in edited.get("options", {}).items() if value is not None}
    shown = {name: public_name(value) if name in (*MODELS, *DATASETS) else value for name, value in options.items()}
    return {"edited": edited, "edit_options": shown}


def _options(facts: Facts, run: Path) -> Iterator[tuple[str, Any]]:
    sails, training = facts.options("sails") if facts.subspace else {}, facts.options("training")
    for name in SAILS_OPTIONS:
        yield name, sails.get(name)
    init = facts.identity.get("init")
    own = INITIALIZERS.get(str(init)).options if init in INITIALIZERS else None
    for name in () if own is None else (field.name for field in fields(own)):
        yield name, facts.options("sails").get(name)
    yield "harmful_prompts", public_name(facts.options("sails").get("harmful_prompts"))
    if sails.get("subspace_mode") == "decay":
        yield "subspace_decay", facts.options("callbacks").get("subspace_decay")
    callbacks = facts.options("callbacks")
    yield "ema_half_life", callbacks.get("ema_half_life")
    if callbacks.get("freeze_units"):
        trained = callbacks.get("trained_units")
        yield "trained units" if trained else "frozen units", _joined(trained or callbacks.get("frozen_units"))
    if facts.kind == "clade":
        found = read_config(run)
        yield "clade", callbacks.get("clade")
        yield "classes", _joined(list(found.classes)) if len(found.classes) > 1 else None
        yield "layer of the probe", found.layer if len(found.classes) > 1 else None
        yield "response tokens whose class it predicts", found.probe_accuracy and f"{found.probe_accuracy:.1%}"
        yield "conditional norms", len(found.norms)
    yield from _sparse(facts)
    yield from _zeroth_order(facts)
    if facts.adapter:
        modules = facts.adapter.get("target_modules")
        n_modules = len(modules) if isinstance(modules, list) else 1
        yield "rank", facts.adapter.get("r")
        yield "alpha", facts.adapter.get("lora_alpha")
        yield "adapted modules", f"{n_modules} modules" if n_modules > 12 else _joined(modules)
        yield "layers", _joined(facts.adapter.get("layers_to_transform")) or (None if n_modules > 12 else "all")
    yield from _learned(facts)
    length = "max_steps" if (training.get("max_steps") or -1) > 0 else "num_train_epochs"
    for name in ("learning_rate", "lr_scheduler_type", "warmup_steps", length, *TRAINING_OPTIONS):
        yield name, training.get(name)
    for name in ("beta", "loss_type") if facts.method == "dpo" else ():
        yield name, training.get(name)
    yield "reference model", public_name(facts.options("dpo").get("ref_model_name_or_path"))
    for name in ("engine", "n_processes", "dtype"):
        yield name, facts.identity.get(name)


def _sparse(facts: Facts) -> Iterator[tuple[str, Any]]:
    """Yield the options of a training of few entries, and how many these were."""
    callbacks = facts.options("callbacks")
    if callbacks.get("sift_rate") is None:
        return
    guarded = callbacks.get("sift_safety_dataset_name")
    for name in ("sift_rate", "sift_select_steps", "sift_modules", "sift_entries"):
        yield name, _joined(callbacks.get(name))
    yield "sift_safety_dataset_name", public_name(guarded)
    yield "sift_forbidden", callbacks.get("sift_forbidden") if guarded else None
    found = facts.metrics.get("sift", {})
    yield "trained entries", f"{found['trained_entries']:,} of {found['entries']:,}" if found else None


def _zeroth_order(facts: Facts) -> Iterator[tuple[str, Any]]:
    """Yield the options of a training without gradients, and the privacy that it spent."""
    callbacks, spent = facts.options("callbacks"), facts.metrics.get("privacy")
    if not callbacks.get("zeroth_order"):
        return
    for name in ("zeroth_order", "zo_eps", "zo_directions"):
        yield name, callbacks.get(name)
    if spent:
        yield "privacy", f"epsilon {spent['epsilon']:.4g}, delta {spent['delta']:g} ({spent['neighbours']})"
        yield "sampling", f"{spent['sampling']}, {spent['steps']:,} steps ({spent['accountant']})"
        yield "noise", f"multiplier {spent['noise_multiplier']:.4g}, clip {spent['clip']:g}"
        if not spent["noise_is_secret"]:
            yield "noise seed", "known: whoever has it can remove the noise, so nothing is private"


def _learned(facts: Facts) -> Iterator[tuple[str, Any]]:
    """Yield the options that change what is learned of the data."""
    data = facts.options("data")
    for name, value in (facts.record.get("options", {}).get("loss") or {}).items():
        yield "loss" if name == "name" else name, value
    if data.get("derta_prefix_share") or data.get("derta_rto_share"):
        yield from ((name, data.get(name)) for name in data if name.startswith("derta_"))
    if data.get("nearest_refusal"):
        for name in ("nearest_refusal", "refusal_tokens", "refusal_control_seed", "refusal_stages"):
            yield name, data.get(name)
        yield "refusal_dataset_name", public_name(data.get("refusal_dataset_name"))


def _joined(names: Any) -> Any:
    return ", ".join(sorted(map(str, names))) if isinstance(names, list) else names


def _base_config(facts: Facts, run: Path) -> PreTrainedConfig | None:
    """Return the base model's configuration; None if it is not here any more, which the card can do without."""
    try:
        return load_base_config(read_adapter(run))[1] if facts.adapter else None
    except InputError:
        return None


def _vllm(facts: Facts, run: Path, base_config: PreTrainedConfig | None) -> str:
    """Return the command that serves the model, or what to do first."""
    if facts.kind == "clade":
        return "# not possible: the norms depend on the input"
    if facts.kind != "adapter":
        return "vllm serve PATH --generation-config vllm"
    if base_config is None:
        return "# run: sails check-adapter PATH"
    blocking = [problem.what for problem in serving_report(run, base_config) if problem.blocking]
    if blocking:
        return f"# not as it is: {code_span(blocking[0])[1:-1]};\n# merge it first: sails merge PATH --output MERGED"
    return serve_command(read_adapter(run), facts.base_on_hub or "BASE_MODEL", "PATH")
