"""Check the values of option dataclasses, and convert options to JSON."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sails_align.core.errors import InputError
from sails_align.core.suggestions import suggestion

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""Of a model or a data set on the hub."""


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Raise `InputError` if an option's value is not one of the choices."""
    if value not in choices:
        raise InputError(
            f"{option} is {value!r}, which is not one of: {', '.join(choices)}{suggestion(str(value), choices)}"
        )


def check_choices(options: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Check the options that have choices, by name; None is left to the option's default.

    YAML values become argparse defaults, which argparse does not check; so this is done here and not there.
    """
    for option in fields(options):
        value = getattr(options, option.name)
        if option.name in choices and value is not None:
            check_choice(option.name, value, choices[option.name])


def check_least(options: Any, **least: float) -> None:
    """Raise `InputError` if an option is not a finite number of at least the given value; None is accepted."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and not smallest <= value < float("inf"):
            raise InputError(f"{name} is {value}; choose {smallest} or more")


def check_positive(options: Any, *names: str) -> None:
    """Refuse options, by name, that are not finite numbers above 0."""
    for name in names:
        if not 0 < getattr(options, name) < float("inf"):
            raise InputError(f"{name} is {getattr(options, name)}; choose a value above 0")


def to_json(options: Any) -> dict[str, Any]:
    """Convert options to JSON."""
    return {name: value for name, value in asdict(options).items() if name != "given"}


def all_but(left_out: Collection[str], *options: Any) -> dict[str, Any]:
    """Return every option of some dataclasses by name, as JSON values, except those left out.

    An option that is added later is in the result unless it is named in `left_out`, which says why it need not be.
    The name of a JSON file (such as DeepSpeed's configuration) becomes its content.
    """
    found: dict[str, Any] = {}
    for each in options:  # not by transformers' `to_dict`, which masks every option that is called `..._token`
        names = [field.name for field in fields(each) if field.name not in left_out and field.name != "given"]
        found |= {name: _json(getattr(each, name)) for name in names}
    return found


def _json(value: Any) -> Any:
    """Return a JSON value that stands for an option's value; not of a secret, which is left out by name."""
    if isinstance(value, str) and value.endswith(".json"):
        try:
            return json.loads(Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return value
    plain: Any = value.to_dict() if hasattr(value, "to_dict") else value  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return json.loads(json.dumps(plain, allow_nan=False))
    except (TypeError, ValueError):
        return str(value)


SHOWN_DIFFERENCES = 12


def different(options: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """Return the names of options that differ from earlier ones, each with the earlier value and the present one."""
    if options and not earlier:
        return ["options, which were not recorded"]
    names = [name for name, value in options.items() if name not in earlier or value != earlier[name]]
    return [f"{name} ({_shown(earlier, name)}, now {_shown(options, name)})" for name in names]


def _shown(options: Mapping[str, Any], name: str) -> str:
    text = json.dumps(options[name], ensure_ascii=False) if name in options else "not recorded"
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(differences: Sequence[str]) -> str:
    """Return differences as one line of a message."""
    more = len(differences) - SHOWN_DIFFERENCES
    return ", ".join([*differences[:SHOWN_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])])


OVERWRITE = "Replace what the output folder holds, if it was made with other options."


@dataclass(frozen=True)
class OutputOptions:
    """Results that are there already."""

    overwrite_output_dir: bool = field(default=False, metadata={"help": OVERWRITE})


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Return a dataclass field that is a command-line option, with its default and its help text."""
    metadata = {"help": help, **metadata}
    if isinstance(default, list):  # each instance needs one of its own
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
