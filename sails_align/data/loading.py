"""Load datasets from the hub, local folders and local files, with helpful errors.

A path is a path, never a pattern, and what is cached of local data is found again by its content.
"""

import errno
import glob
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets import config as datasets_config
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from sails_align.core.artifacts import file_hash
from sails_align.core.errors import InputError, first_line, root_cause
from sails_align.core.options import HUB_ID
from sails_align.core.suggestions import did_you_mean_path
from sails_align.data import EMBEDDED
from sails_align.data.files import BUILDERS, UNREADABLE, ending, prepared, separator
from sails_align.data.folders import Files, files_of

logger = logging.getLogger(__name__)
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # it logs errors that it raises as well


class NoSplitError(InputError):
    """A data set does not have the split asked for."""


def load_rows(
    name_or_path: str,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    mark_unreadable: bool = False,
) -> Dataset:
    """Load a dataset as it is. Code from the hub is never run.

    Args:
        name_or_path: a local file (json, jsonl, csv, tsv, parquet; also .gz), a local folder (of such files, or written
            by `save_to_disk`), a name in `data.EMBEDDED`, or the id of a dataset on the hub; what exists locally comes
            first.
        config: configuration of a dataset on the hub (or of a folder that declares some).
        split: a split, or a part of one, such as "train[:10%]".
        revision: branch, tag or commit on the hub.
        mark_unreadable: keep rows of text files that cannot be read, with the cause in the column `files.UNREADABLE`
            (`pairs.normalize` counts them); else they are an error.

    Raises:
        InputError: if it is missing, empty or unreadable, has no such split, or the hub cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link to {path.readlink()}, which is not there; correct the link")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path} is neither a file nor a folder; write its content to a file, and give that")
    builder = BUILDERS.get(ending(path))
    if not path.exists() and (builder or not HUB_ID.fullmatch(name_or_path) or name_or_path.startswith(".")):
        hint = did_you_mean_path(name_or_path) or ";"
        raise InputError(
            f"there is no file or folder {name_or_path}{hint} give a path that exists, or the id of a data set"
        )
    if path.is_file() and builder is None:
        raise InputError(f"{path} is of an unknown kind; give a file ending in {', '.join(BUILDERS)} (or that + .gz)")
    with _load_errors(name_or_path, split):
        if path.is_file():
            dataset = _load_files(str(builder), {"train": [path]}, split)
        elif path.is_dir():
            dataset = _load_files(*files_of(path, config), split)
        elif name_or_path in EMBEDDED:
            dataset = _embedded(name_or_path, split)
        else:
            dataset = load_dataset(name_or_path, config, split=split, revision=revision)
    if len(dataset) == 0:
        raise InputError(f"{name_or_path} (split {split}) is empty; give a data set that has rows")
    if UNREADABLE in dataset.column_names and (not mark_unreadable or dataset.column_names == [UNREADABLE]):
        _refuse_unreadable(dataset, name_or_path + f" (split {split})" * (split != "train"))
    return with_class_names(dataset)


def _embedded(name: str, split: str) -> Dataset:
    """Return a split of a dataset that comes with the package."""
    rows = EMBEDDED.get(name).load()(split)
    if rows is None:
        raise InputError(f"{name} has no split {split!r}; leave the name of the split out")
    return Dataset.from_list(rows)


def with_class_names(dataset: Dataset) -> Dataset:
    """Give the names of classes in place of their numbers, which say nothing by themselves."""
    classes = {name: of for name, of in dataset.features.items() if isinstance(of, ClassLabel)}
    if not classes:
        return dataset

    def named(batch: Mapping[str, list]) -> dict[str, list]:
        return {
            name: [None if number is None or number < 0 else of.int2str(number) for number in batch[name]]
            for name, of in classes.items()
        }

    features = Features({**dataset.features, **{name: Value("string") for name in classes}})
    with cache_errors():
        return dataset.map(named, batched=True, features=features, desc="Reading the names of classes")


def _refuse_unreadable(dataset: Dataset, name: str) -> None:
    bad = [(index, cause) for index, cause in enumerate(dataset[UNREADABLE]) if cause is not None]
    if bad:
        rows = ", ".join(str(index) for index, _ in bad[:3]) + (", ..." if len(bad) > 3 else "")
        causes = ", ".join(dict.fromkeys(cause for _, cause in bad))
        raise InputError(
            f"{len(bad)} of {len(dataset)} rows of {name} cannot be read: {causes} (row {rows}; counted from 0);\n"
            "repair them, or leave them out with --on_bad_rows skip"
        )


def without_unreadable(dataset: Dataset, name: str) -> Dataset:
    """Leave out the rows that `load_rows` has marked as unreadable, with a warning that counts them."""
    if UNREADABLE not in dataset.column_names:
        return dataset
    causes = Counter(cause for cause in dataset[UNREADABLE] if cause is not None)
    logger.warning("%s: left out: %s", name, ", ".join(f"{cause}: {n}" for cause, n in causes.most_common()))
    kept = [index for index, cause in enumerate(dataset[UNREADABLE]) if cause is None]
    return dataset.select(kept).remove_columns(UNREADABLE)


def _load_files(builder: str, files: Files, split: str) -> Dataset:
    asked = {part.partition("[")[0].strip() for part in split.split("+")}
    # Others may have other columns, which `datasets` refuses, or bad rows. It says which splits there are.
    files = {name: of_split for name, of_split in files.items() if name in asked} if asked <= files.keys() else files
    cache = _cache_of(files)
    try:
        return _build(builder, _prepared(files, cache, strict=False), split, cache)
    except (DatasetsError, RecursionError, ValueError):
        with_marks = _prepared(files, cache, strict=True)
        if builder != "json" or with_marks == _prepared(files, cache, strict=False):
            raise
        return _build(builder, with_marks, split, cache)


def _prepared(files: Files, cache: Path, strict: bool) -> Files:
    """Prepare all files; each has a folder of its own, since two may have the same name."""
    return {
        split: [prepared(file, cache / split / str(number), strict) for number, file in enumerate(of_split)]
        for split, of_split in files.items()
    }


def _build(builder: str, files: Files, split: str, cache: Path) -> Dataset:
    every = [file for of_split in files.values() for file in of_split]
    options: dict[str, Any] = {}
    if builder == "csv" and all(ending(file) in (".csv", ".tsv") for file in every):
        # A csv file has texts: without features, "007" were a number, "True" a truth value and "N/A" a missing value.
        options = {"sep": separator(every[0]), "keep_default_na": False, "features": _texts(every[0])}
    elif builder == "csv":  # with unreadable rows; the others are to be in the same form
        builder = "json"
        every_csv = [file for file in every if ending(file) != ".jsonl"]
        if every_csv:
            raise ValueError(f"another file of the folder has rows that cannot be read; give {every_csv[0]} alone")
    data_files = {name: [glob.escape(str(file)) for file in of_split] for name, of_split in files.items()}
    return load_dataset(builder, data_files=data_files, split=split, cache_dir=str(cache), **options)


def _texts(path: Path) -> Features:
    header = pandas.read_csv(path, sep=separator(path), nrows=0, keep_default_na=False)
    return Features({str(column): Value("string") for column in header.columns})


def _cache_of(files: Files) -> Path:
    """Return the folder in the cache of datasets for splits of files with these names and contents."""
    digest = hashlib.sha256()
    for split, file in ((split, file) for split, of_split in files.items() for file in of_split):
        digest.update(f"{split} {file.resolve()} {file_hash(file)}\n".encode("utf-8", "surrogateescape"))
    return Path(datasets_config.HF_DATASETS_CACHE) / "sails-align" / digest.hexdigest()[:32]


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
            f"{name} is not in the cache and the hub cannot be reached; it is no local file or folder either"
            f"{did_you_mean_path(name) or '.'}\n"
            "Check the path or the connection (and HF_HUB_OFFLINE), or copy the data here and give its path"
        ) from error
    except DatasetNotFoundError as error:
        raise InputError(
            f"{name} cannot be loaded: {error}\nCheck the id and the revision; for a private or gated data set, "
            "log in with `hf auth login`"
        ) from error
    except StopIteration as error:  # what `load_dataset` raises on a JSON file of zero bytes
        raise InputError(f"{name} (split {split}) is empty; give a data set that has rows") from error
    except (DatasetsError, OSError, RuntimeError, TypeError, ValueError) as error:
        cause = first_line(root_cause(error))
        no_rows = ("corresponds to no data", "BatchSize must be greater than 0")  # the latter: of a parquet file
        if any(sign in cause for sign in no_rows):
            raise InputError(f"{name} (split {split}) is empty; give a data set that has rows") from error
        kind = NoSplitError if "Unknown split" in cause else InputError
        raise kind(
            f"{name} (split {split}) cannot be loaded: {cause}\n"
            "Give a file or folder of json, jsonl, csv, tsv or parquet data, or a data set of the hub, and a split it "
            "has"
        ) from error


@contextmanager
def cache_errors() -> Iterator[None]:
    """Turn a cache on a full or forbidden disk into an `InputError`."""
    try:
        yield
    except (OSError, DatasetsError) as error:
        root = root_cause(error)
        unwritable = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
        if not isinstance(root, OSError) or root.errno not in unwritable:
            raise
        raise InputError(
            f"cannot use the cache of data sets, {datasets_config.HF_DATASETS_CACHE}: {root}\n"
            "free some space, or set HF_DATASETS_CACHE to a folder on another disk"
        ) from error
