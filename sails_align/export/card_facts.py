"""Read what a run directory says of its run, for the model card."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, try_to_load_from_cache
from yaml import YAMLError

from sails_align.core.artifacts import read_header
from sails_align.core.errors import InputError
from sails_align.core.options import HUB_ID
from sails_align.core.suggestions import did_you_mean_path
from sails_align.core.text import code_span
from sails_align.models import clade
from sails_align.models.adapters import CONFIG, read_json
from sails_align.models.gguf import SOURCE

LICENSES = {
    r"google/gemma-(1\.1-|2-|3-)?\d+[bm](-.*)?": "gemma",
    r"meta-llama/Llama-2-.*": "llama2",
    r"meta-llama/Meta-Llama-3-.*": "llama3",
    r"meta-llama/(Meta-)?Llama-3\.1-.*": "llama3.1",
    r"meta-llama/Llama-3\.2-.*": "llama3.2",
    r"meta-llama/Llama-3\.3-.*": "llama3.3",
    r"HuggingFaceTB/SmolLM2-.*": "apache-2.0",
}
"""The hub's names of licences, by patterns of base models on the hub."""


@dataclass(frozen=True)
class Facts:
    """Hold what is known of a run; dictionaries are empty where a file is missing."""

    kind: Literal["adapter", "merged", "full", "clade"]
    record: dict[str, Any]
    """run.json"""
    metrics: dict[str, Any]
    """metrics.json"""
    adapter: dict[str, Any]
    """adapter_config.json"""
    subspace: dict[str, Any]
    """Provenance of the subspace."""
    base_model: str | None
    """What `from_pretrained` was given: an id on the hub, or a path."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the run was made from."""
        return self.record.get("identity", {})

    def options(self, group: str) -> dict[str, Any]:
        """Return the options of a group: script, data, sails, training, ..."""
        return self.record.get("options", {}).get(group, {})

    @property
    def method(self) -> str | None:
        """`sft` or `dpo`."""
        return self.identity.get("method")

    @property
    def base_on_hub(self) -> str | None:
        """Id of the base model on the hub; None if it is a local one."""
        return hub_id(self.base_model) if "files" not in self.identity.get("model", {}) else None

    @property
    def base_label(self) -> str:
        """Name of the base model in a code span; of a local one without its folder."""
        if self.base_model is None:
            return "an unnamed model"
        name = "testbed" if self.on_testbed else self.base_on_hub or self.gguf_file or Path(self.base_model).name
        return code_span(name)

    @property
    def gguf_file(self) -> str | None:
        """Name of the GGUF file that the base model's weights were dequantized from, if they were."""
        source = read_json(Path(str(self.base_model)) / SOURCE)
        return str(source["file"]) if "file" in source else None

    @property
    def on_testbed(self) -> bool:
        """Whether the requests are those of the testbed: only there a run needs no data set."""
        script = self.options("script")
        return bool(script) and script.get("dataset_name") is None

    def license(self) -> str | None:
        """Return the base model's licence, by its own card or its name; None if it is unknown without network."""
        if self.base_model is None:
            return None
        card = Path(self.base_model) / "README.md"
        if not card.is_file() and self.base_on_hub:
            cached = try_to_load_from_cache(self.base_on_hub, "README.md")
            card = Path(cached) if isinstance(cached, str) else card
        try:
            said = ModelCard.load(card, ignore_metadata_errors=True).data.get("license") if card.is_file() else None
        except (OSError, ValueError, TypeError, YAMLError):  # whatever a stranger's card holds
            said = None
        named = (found for pattern, found in LICENSES.items() if re.fullmatch(pattern, self.base_on_hub or ""))
        return said if isinstance(said, str) and re.fullmatch(r"[\w.-]+", said) else next(named, None)


def read_facts(run: Path, *, merged: bool, base_model: str | None = None) -> Facts:
    """Read a run directory; `base_model` is the model's name, if nothing there says it.

    Raises `InputError` if there is no such directory, or a file is damaged.
    """
    if not run.is_dir():
        raise InputError(
            f"there is no folder {run}{did_you_mean_path(str(run)) or ';'} give the directory of a finished run"
        )
    record, adapter, metrics = (read_json(run / name) for name in ("run.json", CONFIG, "metrics.json"))
    header = read_header(run / "subspace", "subspace") or {}
    return Facts(
        kind=_kind(run, adapter, merged),
        record=record,
        metrics=metrics,
        adapter=adapter,
        subspace=header.get("provenance", {}),
        base_model=adapter.get("base_model_name_or_path")
        or record.get("options", {}).get("model", {}).get("model_name_or_path")
        or base_model,
    )


def _kind(run: Path, adapter: dict[str, Any], merged: bool) -> Literal["adapter", "merged", "full", "clade"]:
    if (run / clade.CONFIG).is_file():
        return "clade"
    return "full" if not adapter else "merged" if merged else "adapter"


def hub_id(name: Any) -> str | None:
    """Return the name if it can only be an id on the hub."""
    is_id = isinstance(name, str) and "/" in name and HUB_ID.fullmatch(name) and not name.startswith(".")
    return name if is_id and not Path(name).exists() else None


def public_name(name: Any) -> str | None:
    """Return an id on the hub as it is, and of a path its last part."""
    return hub_id(name) or (Path(str(name)).name if name else None)


def number(value: Any, form: str) -> str:
    """Return a number as Markdown; what is no number is unknown."""
    return format(value, form) if isinstance(value, int | float) and not isinstance(value, bool) else "unknown"
