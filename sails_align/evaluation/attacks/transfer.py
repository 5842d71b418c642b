"""Suffixes that were found on other prompts or another model, tried on these."""

import json
from collections.abc import Sequence
from pathlib import Path

from sails_align.core.errors import InputError
from sails_align.evaluation.attacks import Setting
from sails_align.evaluation.attacks.options import TransferArguments
from sails_align.evaluation.attacks.wrappers import with_suffix
from sails_align.evaluation.records import Prompt


def attack(options: TransferArguments, prompts: Sequence[Prompt], setting: Setting) -> list[Prompt]:
    """Add every suffix of a file to every prompt.

    Raises:
        InputError: if no file is given, or it cannot be read.
    """
    if options.suffixes is None:
        raise InputError("no suffixes are given; give --suffixes, the attacked.jsonl of a search")
    return transfer(read_suffixes(Path(options.suffixes)), prompts)


def transfer(suffixes: Sequence[str], prompts: Sequence[Prompt]) -> list[Prompt]:
    """Every prompt with every suffix, also with those found on other prompts or another model.

    Raises:
        InputError: if there are no suffixes.
    """
    if not suffixes:
        raise InputError("no suffixes to transfer; give a file that `sails attack gcg` wrote, or one suffix a line")
    distinct = list(dict.fromkeys(suffixes))
    return [
        with_suffix(prompt, suffix, f"transfer_{number}")
        for number, suffix in enumerate(distinct)
        for prompt in prompts
    ]


def read_suffixes(path: Path) -> list[str]:
    """Suffixes of a file: `meta.suffix` or `suffix` of each line of JSON, or the lines of a text.

    Raises:
        InputError: if it cannot be read, or a line of JSON has no suffix.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix not in (".json", ".jsonl"):
            return [line.strip() for line in lines]
        rows = [json.loads(line) for line in lines]
        return [_text(row["suffix"] if "suffix" in row else row["meta"]["suffix"]) for row in rows]
    except OSError as error:
        raise InputError(f"cannot read the suffixes {path}: {error.strerror}; check the path") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is no file of suffixes ({type(error).__name__}: {error});\n"
            "give the attacked.jsonl of `sails attack gcg`, or a text with one suffix a line"
        ) from error


def _text(suffix: object) -> str:
    if not isinstance(suffix, str):
        raise TypeError(f"the suffix {suffix!r} is no text")
    suffix.encode()  # half surrogates cannot be sent
    return suffix
