"""Check the values of option dataclasses, and convert options to JSON."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields
from typing import Any

from sails_align.core.errors import InputError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""Of a model or a data set on the hub."""


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Raise `InputError` if an option's value is not one of the choices."""
    if value not in choices:
        raise InputError(f"{option} is {value!r}, which is not one of: {', '.join(choices)}")


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


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Return a dataclass field that is a command-line option, with its default and its help text."""
    metadata = {"help": help, **metadata}
    if isinstance(default, list):  # each instance needs one of its own
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
