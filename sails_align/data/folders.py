"""Find the data files of a local folder, by split: as its README.md declares them, or else by their names."""

import glob
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets.data_files import DataFilesPatternsDict, get_data_patterns, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from sails_align.core.errors import InputError
from sails_align.data.files import BUILDERS, ending

Files = Mapping[str, Sequence[Path]]
"""The files of each split."""
_CARDS = {".huggingface.yaml": "(.*)", "README.md": r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*$"}
"""Where a folder may declare its configurations, the first that does so counts -> what of it is YAML."""


def files_of(folder: Path, config: str | None) -> tuple[str, Files]:
    """Return the builder of `datasets` that reads the data files of a folder, and the files of each split.

    Raises `InputError` if the folder has no such configuration, or its files are of two formats.
    """
    saved_dict = folder / "dataset_dict.json"
    if saved_dict.is_file() or (folder / "state.json").is_file():
        # Not `load_from_disk`: what is later derived from its data sets is cached in the user's folder.
        splits = json.loads(saved_dict.read_text(encoding="utf-8"))["splits"] if saved_dict.is_file() else ["train"]
        folders = {name: folder / name if saved_dict.is_file() else folder for name in splits}
        arrows = {name: sorted(of_split.glob("*.arrow")) for name, of_split in folders.items()}
        return "arrow", {name: files for name, files in arrows.items() if files}
    declared = declared_configs(folder)
    if config is not None and config not in (declared or ("default",)):
        has = f"declares the configurations {', '.join(declared)}" if declared else "declares no configurations"
        raise InputError(f"{folder} {has}, and not {config!r}; name one of them, or none")
    base = folder.resolve()
    if declared:
        base, patterns = _declared(declared, config, folder)
    else:
        patterns = get_data_patterns(glob.escape(str(base)))
    found = DataFilesPatternsDict.from_patterns(patterns).resolve(glob.escape(str(base)))
    files = {str(name): [Path(file) for file in of_split] for name, of_split in found.items()}
    readable = {name: [file for file in of_split if ending(file) in BUILDERS] for name, of_split in files.items()}
    if not any(readable.values()) or (declared and not all(readable.values())):
        unread = ", ".join(name for name, of_split in readable.items() if not of_split)
        raise ValueError(f"{folder} doesn't contain any data files that can be read (split {unread})")
    readable = {name: of_split for name, of_split in readable.items() if of_split}
    return _builder(readable, folder), readable


def _builder(files: Files, folder: Path) -> str:
    """Return the builder of all files; refuse files of two formats, of which one would be left out."""
    first: dict[tuple[str, bool], Path] = {}
    for file in (file for of_split in files.values() for file in of_split):
        first.setdefault((BUILDERS[ending(file)], ending(file) == ".tsv"), file)
    if len(first) > 1:
        names = ", ".join(str(file.relative_to(folder.resolve())) for file in first.values())
        raise InputError(
            f"{folder} holds data files of {len(first)} formats ({names}), and it is not clear which are meant;\n"
            "give one of the files, or a folder with files of one format"
        )
    return next(iter(first))[0]


def declared_configs(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return the configurations that a folder declares in the header of its card: name -> settings.

    Raises `InputError` if the header cannot be read.
    """
    for name, pattern in _CARDS.items():
        card = folder / name
        text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
        header = re.match(pattern, text, re.DOTALL | re.MULTILINE)
        if header is None or "configs:" not in header[1]:
            continue
        try:
            given = (yaml.safe_load(header[1]) or {}).get("configs") or []
            of_files = [{key: value for key, value in each.items() if key != "features"} for each in given]
            if declared := MetadataConfigs.from_dataset_card_data(DatasetCardData(configs=of_files)):
                return declared
        except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
            cause = " ".join(str(error).split())[:200]
            raise InputError(
                f"{card} declares `configs` in its header, which cannot be read: {cause};\n"
                "correct it, or give a data file of the folder"
            ) from error
    return {}


def _declared(
    declared: Mapping[str, Mapping[str, Any]], config: str | None, folder: Path
) -> tuple[Path, dict[str, list[str]]]:
    """Return the folder of a configuration, and the patterns of the files of its splits."""
    marked = [name for name, settings in declared.items() if settings.get("default") or name == "default"]
    names = list(declared) if len(declared) == 1 else marked
    if config is None and len(names) != 1:
        raise InputError(f"{folder} declares the configurations {', '.join(declared)}; name one of them")
    settings = declared[config or names[0]]
    if unknown := [name for name in ("sep", "delimiter", "field", "names", "header") if name in settings]:
        raise InputError(
            f"{folder} declares {unknown[0]}: {settings[unknown[0]]!r} for its files, which is not supported;\n"
            "convert them to jsonl, or to csv with commas and a header line"
        )
    base = folder.resolve() / settings.get("data_dir", "")
    if "data_files" not in settings:
        return base, get_data_patterns(glob.escape(str(base)))
    patterns = {name: list(map(str, of_split)) for name, of_split in sanitize_patterns(settings["data_files"]).items()}
    every = [pattern for of_split in patterns.values() for pattern in of_split]
    if remote := [pattern for pattern in every if "::" in pattern or "://" in pattern]:
        raise InputError(f"{folder} declares the data file {remote[0]}, which is not in the folder; download it")
    return base, patterns
