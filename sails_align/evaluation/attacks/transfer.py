"""Try suffixes that were found on other prompts or another model."""

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

    Raises `InputError` if no file is given, it cannot be read, or it has no suffixes.
    """
    if options.suffixes is None:
        raise InputError("no suffixes are given; give --suffixes, the attacked.jsonl of a search")
    suffixes = dict.fromkeys(read_suffixes(Path(options.suffixes)))
    if not suffixes:
        raise InputError(
            f"{options.suffixes} has no suffixes; give a file that `sails attack gcg` wrote, or one suffix a line"
        )
    return [
        with_suffix(prompt, suffix, f"transfer_{number}")
        for number, suffix in enumerate(suffixes)
        for prompt in prompts
    ]


def read_suffixes(path: Path) -> list[str]:
    """Read suffixes from a file: `meta.suffix` or `suffix` of each line of JSON, or the lines of a text.

    Raises `InputError` if it cannot be read, or a line of JSON has no suffix.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if path.suffix not in (".json", ".jsonl"):
            return lines
        rows = [json.loads(line) for line in lines]
        suffixes = [row["suffix"] if "suffix" in row else row["meta"]["suffix"] for row in rows]
        for suffix in suffixes:
            str.encode(suffix)  # fails for what is no text, and for lone surrogates, which cannot be sent
        return suffixes
    except OSError as error:
        raise InputError(f"cannot read the suffixes {path}: {error.strerror}; check the path") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is no file of suffixes ({type(error).__name__}: {error});\n"
            "give the attacked.jsonl of `sails attack gcg`, or a text with one suffix a line"
        ) from error
