"""The command line and a YAML file -> dataclasses of options, with errors a user can act on.

This is TRL's `TrlParser`, but that values of the YAML file are read as those of the command line are: TRL makes them
argparse's defaults, whose types and choices argparse does not check.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser  # pyright: ignore[reportPrivateImportUsage]

from sails_align.core.errors import CommandParser, InputError

KINDS = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}


@dataclass(frozen=True)
class CommandLine:
    """What the user wrote: options on the command line, and those of the file named by `--config`."""

    options: list[str]
    path: str | None
    from_file: dict[str, Any]
    given: dict[str, Any] = field(default_factory=dict, init=False)
    """After `parse`: the value of each option on the command line or in the file."""

    @classmethod
    def read(cls, argv: Sequence[str] | None) -> "CommandLine":
        """Take a command line (None: this process's) apart.

        Raises:
            InputError: if the file cannot be read or is not a mapping of options.
        """
        peek = CommandParser(add_help=False, allow_abbrev=False)
        peek.add_argument("--config")
        known, rest = peek.parse_known_args(sys.argv[1:] if argv is None else list(argv))
        return cls(rest, known.config, _read_yaml(known.config) if known.config else {})

    def value(self, name: str) -> str | None:
        """What an option is given as, before it is checked; None if it is left out."""
        peek = CommandParser(add_help=False, allow_abbrev=False)
        peek.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest="value", nargs="?", const="true")
        on_line = peek.parse_known_args(self.options)[0].value
        value = self.from_file.get(name) if on_line is None else on_line
        return None if value is None else str(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """Whether an option is on, before it is checked."""
        value = self.value(name)
        return default if value is None else value.lower() in ("true", "yes", "t", "y", "1")

    def parse(
        self, classes: Iterable[type], *, defaults: Mapping[str, Any] | None = None, prog: str | None = None
    ) -> tuple[Any, ...]:
        """An instance of each dataclass. The command line goes before the file, and the file before the defaults.

        Args:
            classes: of options, each of which becomes `--name`.
            defaults: in place of those of the dataclasses.
            prog: what `--help` calls the command.

        Raises:
            InputError: for an unknown option or a value that cannot be used.
        """
        parser = _Parser(list(classes), prog=prog, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
        parser.add_argument("--config", help="A YAML file of options; those on the command line go before it.")
        known = {name for action in parser._actions for name in action.option_strings}
        parser.set_defaults_with_config(**(defaults or {}))
        values = {name: value for name, value in self.from_file.items() if name != "env"}
        for name in values:
            if f"--{name}" not in known - {"--config"}:
                raise InputError(f"{self.path} has the unknown option {name!r}{_closest(f'--{name}', known)}")
        checked = {}
        for action in parser._actions:
            if action.dest in values and action.dest not in checked:
                checked[action.dest] = self._checked(action, values[action.dest])
        parser.set_defaults_with_config(**checked)
        self._set_environment()
        try:
            *parsed, _, rest = parser.parse_args_into_dataclasses(self.options, return_remaining_strings=True)
        except InputError:
            raise
        except (ValueError, TypeError) as error:  # of TRL's and transformers' own checks
            lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
            raise InputError("\n".join(lines[:3])) from error
        except ImportError as error:  # such as of DeepSpeed, for --deepspeed
            raise InputError(
                f"an option needs a package that is not installed: {str(error).strip().splitlines()[0]}\n"
                "install it (DeepSpeed: pip install 'sails-align[deepspeed]'), or leave the option out"
            ) from error
        if rest:
            name = rest[0].partition("=")[0]
            raise InputError(f"unknown option {name!r} on the command line{_closest(name, known)}")
        _check_texts(parsed)
        self.given.update({**checked, **self._on_line(parser)})
        return tuple(parsed)

    def _on_line(self, parser: argparse.ArgumentParser) -> dict[str, Any]:
        """The values of the options on the command line alone; the parser is of no use for anything else afterwards."""
        parser._defaults.clear()
        for action in parser._actions:
            action.default, action.required = argparse.SUPPRESS, False
        return vars(parser.parse_known_args(self.options)[0])

    def _checked(self, action: argparse.Action, value: Any) -> Any:
        """A value of the file as argparse would have it."""
        if action.nargs == "+" and value is not None:
            items = value if isinstance(value, list) else [value]
            return [self._converted(action, item) for item in items]
        return self._converted(action, value)

    def _converted(self, action: argparse.Action, value: Any) -> Any:
        # TRL wraps the type of an option that may be none, and keeps its name.
        kind = str(getattr(action.type, "__name__", None))
        if (value is None and action.type not in (int, float)) or (
            isinstance(value, bool) and kind == "string_to_bool"
        ):
            return value
        if isinstance(value, list | dict) and kind not in KINDS:
            return value  # for options that are JSON on the command line
        text = str(value).lower() if isinstance(value, bool) else str(value)
        try:
            return action.type(text) if callable(action.type) else text
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            wanted = KINDS.get(kind, "a value of another kind")
            raise InputError(f"{self.path}: {action.dest} is {value!r}, but it must be {wanted}; correct it") from error

    def _set_environment(self) -> None:
        """Set the variables under `env:`, as TRL does."""
        variables = self.from_file.get("env") or {}
        if not isinstance(variables, dict):
            raise InputError(f"{self.path}: env is {variables!r}, but it must be a mapping of variable: value")
        os.environ.update({str(name): str(value) for name, value in variables.items()})


class _Parser(CommandParser, TrlParser):
    pass


def _check_texts(parsed: Sequence[Any]) -> None:
    """Refuse what a YAML file gives for a text of ours but is none: argparse takes lists and null as they are."""
    for options in parsed:
        for option in fields(options) if type(options).__module__.startswith("sails_align.") else ():
            value = getattr(options, option.name)
            # transformers' parser has taken the None out of `str | None`
            may_be_none = value is None and option.default is None
            if option.type in (str, str | None) and not isinstance(value, str) and not may_be_none:
                raise InputError(f"{option.name} is {value!r}, but it must be a text; correct it")


def _closest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {found[0]}?" if found else "; remove it (--help lists the options)"


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise InputError(f"{path} is not YAML ({where}); correct it") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{path} is not a YAML mapping of option: value; write a line like `learning_rate: 0.001`")
    return values
