"""Save a stage's result as a folder of tensors and provenance, written atomically and checked when read.

<folder>/<kind>.safetensors   the tensors
<folder>/<kind>.json          kind, format, sha256 of the tensors, input_hash, provenance
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.core.errors import InputError
from sails_align.core.files import atomic_folder, write_json
from sails_align.core.machine import installed_version

if TYPE_CHECKING:
    import torch

FORMAT = 1
PACKAGES = (
    "sails-align",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "sae-lens",
    "deepspeed",
    "safetensors",
    "tokenizers",
)


def content_hash(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON-able value in canonical form, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_hash(tensors: Mapping[str, "torch.Tensor"]) -> str:
    """Return the SHA-256 (hex) of named tensors: names, dtypes, shapes and bytes, in the order of the names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str | None]:
    """Return the installed versions of the packages that affect a result; None for a missing package."""
    return {package: installed_version(package) for package in PACKAGES}


def save_artifact(
    folder: Path, kind: str, tensors: Mapping[str, "torch.Tensor"], provenance: Mapping[str, Any], input_hash: str
) -> None:
    """Write an artifact as a whole or not at all, to a folder of its own; one of the same kind is replaced.

    `input_hash` is the `content_hash` of all that decides the result: a stage with the same hash need not run again.
    `provenance` is JSON-able. Raises `InputError` if it cannot be written, or the folder holds anything else.
    """
    from safetensors.torch import save_file

    own = {f"{kind}.safetensors", f"{kind}.json"}
    others = sorted(path.name for path in folder.iterdir() if path.name not in own) if folder.is_dir() else []
    if others:
        raise InputError(
            f"cannot write a {kind} artifact to {folder}: it holds {others[0]!r}; give a folder of its own"
        )
    with atomic_folder(folder) as temporary:
        tensor_file = temporary / f"{kind}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, tensor_file)
        tensor_file.chmod(0o644)  # safetensors makes it private
        header = {"kind": kind, "format": FORMAT, "sha256": file_hash(tensor_file), "input_hash": input_hash}
        write_json(temporary / f"{kind}.json", {**header, "provenance": dict(provenance)})


def read_header(folder: Path, kind: str) -> dict[str, Any] | None:
    """Read the JSON of an artifact (None without one); raise `InputError` for another kind, format, or damage."""
    path = folder / f"{kind}.json"
    if not path.is_file():
        return None
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete the folder and it will be built again") from error
    # One that lacks a key was not written by us, whatever it says.
    keys = {"kind", "format", "sha256", "input_hash", "provenance"}
    known = isinstance(header, dict) and keys <= header.keys()
    if not known or header["kind"] != kind or header["format"] != FORMAT:
        raise InputError(f"{path} is not a {kind} artifact of format {FORMAT}; give the folder of one")
    return header


def load_artifact(folder: Path, kind: str) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """Load the tensors and header of an artifact; raise `InputError` if they are missing or not those written."""
    header = read_header(folder, kind)
    if header is None:
        raise InputError(f"{folder} holds no {kind} artifact ({kind}.json is missing); give the folder of one")
    path = folder / f"{kind}.safetensors"
    if not path.is_file() or file_hash(path) != header["sha256"]:
        raise InputError(
            f"{path} is corrupted or missing: it does not have the hash in {kind}.json;\n"
            "delete the folder and it will be built again"
        )
    from safetensors.torch import load_file

    return load_file(path), header
