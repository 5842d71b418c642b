"""Language models: found by name, loaded, looked into.

Names that are no folder, hub id or GGUF file (`testbed`) are resolved by entries that layers above register here, so
that nothing in this folder knows of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sails_align.core.registry import Entry, Registry
from sails_align.core.suggestions import did_you_mean_path

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Of weights; `auto` is the checkpoint's own."""
FAMILIES: Mapping[str, str] = {
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "llama": "Llama and models of its architecture, such as SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen 2 and 2.5",
    "qwen3": "Qwen 3",
}
"""Supported architectures: transformers' `model_type`, and what people call them."""


@dataclass(frozen=True)
class Resolver(Entry):
    """A function from a name to the folder of a model, for `NAME`, `NAME:...`, and folders with a marker file."""

    marker: str = ""
    known_as: str = ""
    """The model's name in messages, and in SAEs that are trained on it; "" if that is the name itself."""


RESOLVERS: Registry[Resolver] = Registry("kind of model", {})


def resolver_of(name: str, resolvers: Registry[Resolver] = RESOLVERS) -> Resolver | None:
    """What knows a name; None for folders, hub ids and files."""
    for kind, resolver in resolvers.items():
        if name.partition(":")[0] == kind or (resolver.marker and (Path(name) / resolver.marker).is_file()):
            return resolver
    return None


def similar(name: str) -> str:
    """End a message about a model that is not there: with a model or folder of a similar name; else with nothing."""
    return "" if Path(name).exists() else did_you_mean_path(name, *RESOLVERS.names())
