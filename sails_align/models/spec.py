"""Names, paths and hashes of models. Nothing heavy is imported before it is used."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import content_hash
from sails_align.models import resolver_of

DECIDE = (
    *("config.json", "adapter_config.json", "clade.json", "*.safetensors", "*.bin", "*.py"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt"),
)
"""Files of a model that decide what it computes: also code of its own, and tokenizers of older formats."""


@dataclass(frozen=True)
class ModelSpec:
    """A model to be evaluated, by what `from_pretrained` takes."""

    name: str
    """As the user called it."""
    base: str
    """A local folder or the id of a model on the hub."""
    adapter: str | None
    """A folder with an adapter for it: PEFT's, or `models.clade`'s."""
    tokenizer: str
    """A local folder or an id: the adapter's own, if it has one."""
    identity: Mapping[str, Any]
    """JSON-able: hashes of local files, or commits on the hub."""
    dtype: str = "auto"
    """`float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's own."""
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    """In place of the tokenizer's own."""

    def with_chat_template(self, template: str | None) -> "ModelSpec":
        """Return the model with another chat template; with None, as it is."""
        if template is None:
            return self
        identity = {**self.identity, "chat_template": content_hash(template)}
        return replace(self, chat_template=template, identity=identity)


def model_path(name: str) -> str:
    """Return what `from_pretrained` takes for a name: the folder of `testbed` or of a GGUF file, else the name."""
    resolver = resolver_of(name)
    if resolver is not None:
        return resolver.load()(name)
    if not is_gguf(name):
        return name
    from sails_align.models.gguf import gguf_folder

    return str(gguf_folder(Path(name)))


def stem_of(name: str) -> str:
    """Return what files and folders of a model are called: the last part of its name."""
    return name.rstrip("/").split("/")[-1].replace(":", "-")


def known_as(name: str) -> str:
    """Return the model's name in messages and in SAEs that are trained on it."""
    resolver = resolver_of(name)
    return name if resolver is None else resolver.known_as or name


def is_gguf(name: str) -> bool:
    """Return whether a model's name means a GGUF file."""
    return name.endswith(".gguf")


def identity_of(name: str, commit: str | None = None) -> dict[str, Any]:
    """Return the hashes of a local folder's files, or a name and a commit on the hub."""
    from sails_align.core.artifacts import file_hash

    folder = Path(name)
    if not folder.is_dir():
        return {"name": name, "commit": commit}
    return {"name": folder.name, "files": {file.name: file_hash(file) for file in deciding_files(folder)}}


def is_same_model(earlier: Mapping[str, Any] | None, found: Mapping[str, Any]) -> bool:
    """Return whether two identities are of one model: folders by the files that both know of, whatever they are called.

    None, of a run that does not say its model, is any.
    """
    if earlier is None or not ("files" in earlier and "files" in found):
        return earlier in (None, found)
    return all(found["files"].get(name) == sha256 for name, sha256 in earlier["files"].items())


def deciding_files(folder: Path, also: Iterable[str] = ()) -> list[Path]:
    """Return the files of a model that decide what it computes, and those of the names in `also`."""
    patterns = (*DECIDE, *also)
    return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.name != "training_args.bin")
