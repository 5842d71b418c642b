"""The model card of a finished run: README.md with the hub's metadata, from what the run directory knows.

What is not known is left out, or said to be unknown. Of data sets only names, sizes and hashes enter.
"""

from pathlib import Path

from huggingface_hub import ModelCardData

from sails_align.core.errors import InputError
from sails_align.core.files import write_text
from sails_align.export import card_sections, card_use
from sails_align.export.card_facts import Facts, hub_id, read_facts

KINDS = {
    "adapter": "A LoRA adapter for {}",
    "merged": "{} with a LoRA adapter merged into its weights",
    "full": "{}, fine-tuned",
}


def write_card(run: Path, folder: Path, *, merged: bool = False) -> Path:
    """Write the model card of a run beside its adapter, or beside the merged model. Returns its path.

    Args:
        run: directory of the run: run.json, metrics.json, adapter_config.json and subspace/ are read, where they exist.
        folder: where README.md is written; one that is there is replaced.
        merged: whether the folder holds the merged model.

    Raises:
        InputError: if one of the files is damaged.
    """
    facts = read_facts(run, merged=merged)
    try:
        text = f"---\n{_metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(filter(None, _sections(facts, run)))
    except (AttributeError, TypeError, KeyError) as error:
        raise InputError(
            f"the files in {run} are not as a run writes them ({error}); copy the folder again, or train again"
        ) from error
    path = folder / "README.md"
    write_text(path, text + "\n")
    return path


def _metadata(facts: Facts) -> ModelCardData:
    """What the hub reads. It takes only its own ids for models and data sets, so local ones are left out."""
    on_hub = (hub_id(facts.option("script", "dataset_name")), hub_id(facts.option("data", "helpful_dataset_name")))
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
        datasets=[name for name in on_hub if name] or None,
    )


def _sections(facts: Facts, run: Path) -> list[str]:
    by = f"by {facts.method.upper()}" if facts.method in card_sections.METHODS else ""
    what = KINDS[facts.kind].format(facts.base_label)
    purpose = "Trained to refuse harmful requests and to answer harmless ones, with sails-align."
    return [
        f"# {facts.base_label}, safety-aligned {by}".rstrip() + f"\n\n{what}. {purpose}",
        card_sections.method(facts),
        card_sections.data(facts),
        card_sections.subspace(facts),
        card_sections.metrics(facts),
        card_use.uses(facts),
        card_use.loading(facts, run),
        card_use.license(facts),
        card_use.versions(facts),
        card_use.CITATIONS,
    ]
