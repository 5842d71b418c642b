"""Write files and folders as a whole or not at all, lock them, and say what to do about a disk that refuses."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sails_align.core.errors import InputError

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


@contextmanager
def _making(path: Path) -> Iterator[None]:
    """Do what `disk_errors` does, and also for places where nothing can be created, such as /proc."""
    try:
        with disk_errors(path):
            yield
    except FileNotFoundError as error:
        raise InputError(f"cannot write {path}; choose another folder with --output_dir") from error


def _make_folder(folder: Path) -> None:
    with _making(folder):
        folder.mkdir(parents=True, exist_ok=True)


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
def work_folder(folder: Path) -> Iterator[Path]:
    """Open an `output_folder` for one process at a time; raise `InputError` for another. A killed one releases it."""
    lock = folder / ".lock"
    with output_folder(folder), ExitStack() as stack:
        try:
            stack.enter_context(exclusive(lock, timeout=0))
        except Timeout as error:
            raise InputError(
                f"another process is at work in {folder};\nwait for it, end it (its workers outlive a launcher that "
                "is killed), or choose another --output_dir"
            ) from error
        stack.callback(lock.unlink, missing_ok=True)
        yield folder


@contextmanager
def exclusive(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold an exclusive file lock within the block; a killed process releases it.

    Raises `filelock.Timeout` if another process still holds it after `timeout` seconds (negative: never).
    """
    lock = FileLock(path, timeout=timeout)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except OSError as error:  # some network file systems have no locks, which filelock does not forgive
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
    try:
        yield
    finally:
        lock.release()


OF_TRAINING = ("run.json", "adapter_config.json", "config.json", "checkpoint-*", "warm_start")
"""What a folder holds that a model was trained in, or is in."""


def refuse_trained(folder: Path) -> Path:
    """Return the folder; raise `InputError` if it holds a model or a training, whose results would be replaced."""
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
        with _making(folder):
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
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


@contextmanager
def set_aside(folder: Path) -> Iterator[None]:
    """Move a folder away, so that another takes its place; if the block fails before that, put it back."""
    with disk_errors(folder):
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.replace(folder, aside / folder.name)
    try:
        yield
    except BaseException:
        if not folder.exists():
            os.replace(aside / folder.name, folder)
        raise
    finally:
        shutil.rmtree(aside)


def write_bytes(path: Path, content: bytes, *, is_secret: bool = False) -> None:
    """Write a file atomically: a reader sees the old file or the whole new one. A secret is its owner's alone."""
    _make_folder(path.parent)
    with disk_errors(path):
        with _making(path):
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if not is_secret:
                os.chmod(temporary, 0o644)  # mkstemp makes it private
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str, *, is_secret: bool = False) -> None:
    """Write a text file in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode(), is_secret=is_secret)


def read_record(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; an empty dict if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Any, *, is_secret: bool = False) -> None:
    """Write a JSON file, as `write_bytes` does. NaN and infinities are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", is_secret=is_secret)
