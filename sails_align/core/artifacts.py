"""Save a stage's result as a folder of tensors and provenance, written atomically and checked when read.

<folder>/<kind>.safetensors   the tensors
<folder>/<kind>.json          kind, format, sha256 of the tensors, input_hash, provenance
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sails_align.core.errors import InputError

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


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 (hex) of named tensors: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str | None]:
    """Return the installed versions of the packages that affect a result; None for a missing package."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


REMEDIES = {
    errno.ENOSPC: "free some space, or choose another disk with --output_dir",
    errno.EDQUOT: "your disk quota is used up: free some space, or choose another disk with --output_dir",
    errno.EROFS: "the file system is read-only: choose another folder with --output_dir",
    errno.EACCES: "you may not write there: choose another folder with --output_dir",
    errno.EPERM: "you may not write there: choose another folder with --output_dir",
    errno.ENOTDIR: "a part of the path is a file: choose another folder with --output_dir",
    errno.ENAMETOOLONG: "choose a shorter path with --output_dir",
    errno.EISDIR: "there is a folder of that name: choose another one with --output_dir",
    errno.EEXIST: "a part of the path is a file: choose another folder with --output_dir",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into an `InputError` that names the path."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # tokenizers raises nothing more specific
        code = _error_number(error)
        if code not in REMEDIES:
            raise
        raise InputError(f"cannot write {path}: {os.strerror(code)}; {REMEDIES[code]}") from error


def _error_number(error: Exception) -> int | None:
    """Return the system's error number of an exception, if it has one."""
    if isinstance(error, OSError):
        return error.errno
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # in the text: safetensors and tokenizers
        return int(found[1])
    # torch.save says only that less was written than it meant to write.
    is_short = isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", str(error))
    return errno.ENOSPC if is_short else None


def _make_folder(folder: Path) -> None:
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # /proc, and the like, where nothing can be made
        raise InputError(f"cannot make the folder {folder}; choose another one with --output_dir") from error


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """Create a folder; if the block fails, remove the created folders again, unless they have contents."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    _make_folder(folder)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # another process may be at it, too
            for path in made:
                path.rmdir()  # which fails if it is not empty
        raise


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Lock a folder against a second run within the block. The system releases the lock of a killed process.

    Raises:
        InputError: if another process has the folder.
    """
    path = folder / ".lock"
    with disk_errors(path), path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is at work in {folder};\nwait for it, end it (its workers outlive a launcher that "
                "is killed), or choose another --output_dir"
            ) from error
        except OSError as error:  # some network file systems have no locks
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """Open an `output_folder` for one run at a time.

    Raises:
        InputError: if another process has the folder.
    """
    with output_folder(folder), one_at_a_time(folder):
        yield folder


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Hold an exclusive file lock within the block; other processes wait. A killed process releases it."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


OF_TRAINING = ("run.json", "adapter_config.json", "config.json", "checkpoint-*", "warm_start")
"""What a folder holds that a model was trained in, or is in."""


def refuse_trained(folder: Path) -> Path:
    """Refuse a folder that holds a training, for results of something else.

    Raises:
        InputError: if it holds a model or a training, whose results would be replaced.
    """
    with disk_errors(folder):
        held = next((path.name for name in OF_TRAINING for path in folder.glob(name)), None)
    if held is not None:
        raise InputError(
            f"{folder} holds a model or a training ({held}), whose results would be lost; choose another --output_dir"
        )
    return folder


def cache_folder() -> Path:
    """Return $SAILS_CACHE, or `sails-align` in $XDG_CACHE_HOME (default ~/.cache)."""
    if "SAILS_CACHE" in os.environ:
        return Path(os.environ["SAILS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sails-align"


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` when the block ends, and is removed if it fails."""
    _make_folder(folder.parent)
    with disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file of that name exists")
        temporary = _temporary_folder(folder)
        try:
            yield temporary
            temporary.chmod(0o755)  # mkdtemp makes it private
            if folder.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
                os.replace(folder, old / "replaced")
                os.replace(temporary, folder)
                shutil.rmtree(old)
            else:
                os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _temporary_folder(folder: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except FileNotFoundError as error:  # in /proc, which is there, but nothing can be made in it
        raise InputError(f"cannot make the folder {folder}; choose another one with --output_dir") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old file or the whole new one."""
    _make_folder(path.parent)
    with disk_errors(path):
        try:
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        except FileNotFoundError as error:  # in /proc, which is there, but nothing can be made in it
            raise InputError(f"cannot write {path}; choose another folder") from error
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes it private
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. NaN and infinities are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_artifact(
    folder: Path, kind: str, tensors: Mapping[str, torch.Tensor], provenance: Mapping[str, Any], input_hash: str
) -> None:
    """Write an artifact as a whole or not at all.

    Args:
        folder: where; an artifact of this kind that is already there is replaced.
        kind: "subspace", "stats", ...: what a reader must ask for.
        tensors: of any dtype and shape; shared storage is copied.
        provenance: JSON-able; how the tensors came about.
        input_hash: `content_hash` of all that decides the result; a stage with the same hash need not run again.

    Raises:
        InputError: if it cannot be written, or the folder holds anything else (which would be lost).
    """
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
    """Read the JSON of an artifact; return None if there is no artifact.

    Raises:
        InputError: if the JSON is damaged, or of another kind or format.
    """
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


def load_artifact(folder: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Load the tensors and header of an artifact.

    Raises:
        InputError: if it is missing, of another kind, or its tensors are not the ones that were written.
    """
    header = read_header(folder, kind)
    if header is None:
        raise InputError(f"{folder} holds no {kind} artifact ({kind}.json is missing); give the folder of one")
    path = folder / f"{kind}.safetensors"
    if not path.is_file() or file_hash(path) != header["sha256"]:
        raise InputError(
            f"{path} is corrupted or missing: it does not have the hash in {kind}.json;\n"
            "delete the folder and it will be built again"
        )
    return load_file(path), header
