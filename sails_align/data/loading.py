"""Load datasets from the hub, local folders and local files, with helpful errors."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset, DownloadManager, load_dataset
from datasets import config as datasets_config
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from sails_align.core.errors import InputError
from sails_align.core.options import HUB_ID

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(
    name_or_path: str, *, config: str | None = None, split: str = "train", revision: str | None = None
) -> Dataset:
    """Load a dataset as it is. Code from the hub is never run.

    Args:
        name_or_path: a local file (json, jsonl, csv, parquet; also .gz), a local folder (of such files, or written by
            `save_to_disk`), or the id of a dataset on the hub; what exists locally comes first.
        config: configuration of a dataset on the hub (or of a folder that declares some).
        split: a split, or a part of one, such as "train[:10%]".
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: if it is missing, empty or unreadable, has no such split, or the hub cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    builder = BUILDERS.get(suffixes[-1]) if suffixes else None
    if not path.exists() and (builder or not HUB_ID.fullmatch(name_or_path) or name_or_path.startswith(".")):
        raise InputError(f"there is no file or folder {name_or_path}; give a path that exists, or the id of a data set")
    if path.is_file() and builder is None:
        raise InputError(f"{path} is of an unknown kind; give a file ending in {', '.join(BUILDERS)} (or that + .gz)")
    with _load_errors(name_or_path, split):
        if path.is_file():
            dataset = _load_file(path, str(builder), split)
        elif path.is_dir():
            dataset = _load_folder(path, config, split)
        else:
            dataset = load_dataset(name_or_path, config, split=split, revision=revision)
    if len(dataset) == 0:
        raise InputError(f"{name_or_path} (split {split}) is empty; give a data set that has rows")
    return dataset


def _load_file(path: Path, builder: str, split: str) -> Dataset:
    files = {"train": str(path)}
    if builder == "csv":
        # else pandas takes the text "None" or "N/A", which a response may well be, for a missing value
        return load_dataset("csv", data_files=files, split=split, keep_default_na=False)  # pyright: ignore
    if path.name.endswith(".parquet.gz"):  # of the builders, this one alone reads its files without unpacking them
        files = {"train": DownloadManager().extract(str(path))}
    return load_dataset(builder, data_files=files, split=split)


def _load_folder(path: Path, config: str | None, split: str) -> Dataset:
    saved_dict = path / "dataset_dict.json"
    if not saved_dict.is_file() and not (path / "state.json").is_file():
        return load_dataset(str(path), config, split=split)
    # Not `load_from_disk`: what is later derived from its data sets is cached in the user's folder.
    splits = json.loads(saved_dict.read_text())["splits"] if saved_dict.is_file() else ["train"]
    folders = {name: path / name if saved_dict.is_file() else path for name in splits}
    files = {name: sorted(map(str, folder.glob("*.arrow"))) for name, folder in folders.items()}
    return load_dataset("arrow", data_files=files, split=split)


@contextmanager
def _load_errors(name: str, split: str) -> Iterator[None]:
    """Turn errors of `load_dataset` into an `InputError`."""
    try:
        with cache_errors():
            yield
    except InputError:
        raise
    except ConnectionError as error:
        raise InputError(
            f"{name} is not in the cache and the hub cannot be reached; it is no local file or folder either.\n"
            "Check the path or the connection (and HF_HUB_OFFLINE), or copy the data here and give its path"
        ) from error
    except DatasetNotFoundError as error:
        raise InputError(
            f"{name} cannot be loaded: {error}\nCheck the id and the revision; for a private or gated data set, "
            "log in with `hf auth login`"
        ) from error
    except StopIteration as error:  # what `load_dataset` raises on a JSON file of zero bytes
        raise InputError(f"{name} is empty; give a data set that has rows") from error
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        cause = next((line for line in str(_root_cause(error)).splitlines() if line), type(error).__name__)
        if "corresponds to no data" in cause:
            raise InputError(f"{name} (split {split}) is empty; give a data set that has rows") from error
        raise InputError(
            f"{name} (split {split}) cannot be loaded: {cause}\n"
            "Give a file or folder of json, jsonl, csv or parquet data, or a data set of the hub, and a split it has"
        ) from error


@contextmanager
def cache_errors() -> Iterator[None]:
    """Turn a cache on a full or forbidden disk into an `InputError`."""
    try:
        yield
    except (OSError, DatasetsError) as error:
        root = _root_cause(error)
        unwritable = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
        if not isinstance(root, OSError) or root.errno not in unwritable:
            raise
        raise InputError(
            f"cannot use the cache of data sets, {datasets_config.HF_DATASETS_CACHE}: {root}\n"
            "free some space, or set HF_DATASETS_CACHE to a folder on another disk"
        ) from error


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
