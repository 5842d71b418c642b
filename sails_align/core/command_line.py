"""Read dataclasses of options from the command line and a YAML file, with errors a user can act on.

The parser is TRL's `TrlParser`, which imports neither torch nor transformers. Two things differ: values of the YAML
file are read as those of the command line are (TRL makes them argparse's defaults, whose types and choices argparse
does not check), and `--help` groups the options.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import yaml
from trl import TrlParser  # pyright: ignore[reportPrivateImportUsage]

from sails_align.core.errors import CommandParser, InputError, check_value, first_line
from sails_align.core.library_options import LibraryOptions
from sails_align.core.suggestions import closest, did_you_mean_path

KINDS = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}


@dataclass(frozen=True)
class CommandLine:
    """What the user wrote: options on the command line, and those of the file named by `--config`."""

    options: list[str]
    path: str | None
    from_file: dict[str, Any]

    @classmethod
    def read(cls, argv: Sequence[str] | None) -> "CommandLine":
        """Split a command line (None: this process's) into options and those of the `--config` file.

        `--threads` is not among them: it takes effect at once.
        """
        peek = CommandParser(add_help=False, allow_abbrev=False)
        peek.add_argument("--config")
        peek.add_argument("--threads")
        known, rest = peek.parse_known_args(sys.argv[1:] if argv is None else list(argv))
        if known.threads is not None:
            _set_threads(known.threads)
        return cls(rest, known.config, _read_yaml(known.config) if known.config else {})

    def value(self, name: str) -> str | None:
        """Return the unchecked value of an option; None if it is left out."""
        peek = CommandParser(add_help=False, allow_abbrev=False)
        peek.add_argument(*_spellings(name), dest="value", nargs="?", const="true")
        on_line = peek.parse_known_args(self.options)[0].value
        value = self.from_file.get(name) if on_line is None else on_line
        return None if value is None else str(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """Return whether an option is on, before it is checked."""
        value = self.value(name)
        return default if value is None else value.lower() in ("true", "yes", "t", "y", "1")

    def parse(
        self,
        classes: Iterable[type],
        *,
        defaults: Mapping[str, Any] | None = None,
        prog: str | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        library: LibraryOptions | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> tuple[Any, ...]:
        """Return an instance of each dataclass. The command line goes before the file, the file before the defaults.

        Args:
            classes: of options, each of which becomes `--name`.
            defaults: in place of those of the dataclasses.
            prog: name of the command in `--help`.
            groups: names of options by the title that `--help` shows them under (default: their dataclass's).
            library: options of another library to accept without reading their values, before it is imported.
            texts: what `--help` says of some options, by name, in place of their own text.

        Raises:
            InputError: for an unknown option or a value that cannot be used.
        """
        parser = _Parser(classes, prog, groups, library)
        parser.describe(texts or {})
        known = parser.names()
        parser.set_defaults_with_config(**(defaults or {}))
        parser.set_defaults_with_config(**self._of_file(parser))
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
                f"an option needs a package that is not installed: {first_line(error)}\n"
                "install it (DeepSpeed: pip install 'sails-align[deepspeed]'), or leave the option out"
            ) from error
        if rest:
            name = rest[0].partition("=")[0]
            raise InputError(f"unknown option {name!r} on the command line{_closest(name, known)}")
        _check_texts(parsed)
        return tuple(parsed)

    def given(self, classes: Iterable[type]) -> dict[str, Any]:
        """Return the value of each option on the command line or in the file, once `parse` has accepted them."""
        parser = _Parser(classes)
        of_file = self._of_file(parser)
        for action in parser._actions:
            action.default, action.required = argparse.SUPPRESS, False
        return {**of_file, **vars(parser.parse_known_args(self.options)[0])}

    def without(self, classes: Iterable[type]) -> list[str]:
        """Return the command line with `--config`, but without the options of the dataclasses."""
        parser = _Parser(classes)
        for action in parser._actions:
            action.required = False
        config = [] if self.path is None else ["--config", self.path]
        return [*parser.parse_known_args(self.options)[1], *config]

    def _of_file(self, parser: "_Parser") -> dict[str, Any]:
        """Return the values of the file as argparse would."""
        values = {name: value for name, value in self.from_file.items() if name != "env"}
        known = parser.names()
        for name in values:
            if f"--{name}" not in known - {"--config", "--threads"}:
                raise InputError(f"{self.path} has the unknown option {name!r}{_closest(f'--{name}', known)}")
        checked = {}
        for action in parser._actions:
            if action.dest in values and action.dest not in checked:
                checked[action.dest] = self._checked(action, values[action.dest])
        return checked

    def _checked(self, action: argparse.Action, value: Any) -> Any:
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
            converted = action.type(text) if callable(action.type) else text
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            wanted = KINDS.get(kind, "a value of another kind")
            raise InputError(f"{self.path}: {action.dest} is {value!r}, but it must be {wanted}; correct it") from error
        check_value(action, converted, f"{self.path}: ")
        return converted

    def _set_environment(self) -> None:
        """Set the variables under `env:`, as TRL does."""
        variables = self.from_file.get("env") or {}
        if not isinstance(variables, dict):
            raise InputError(f"{self.path}: env is {variables!r}, but it must be a mapping of variable: value")
        os.environ.update({str(name): str(value) for name, value in variables.items()})


class _Parser(CommandParser, TrlParser):
    """TRL's parser with our help, and with positional arguments: fields that have `positional` in their metadata."""

    def __init__(
        self,
        classes: Iterable[type],
        prog: str | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        library: LibraryOptions | None = None,
    ) -> None:
        """Make the parser of some dataclasses; with a library, show only grouped options of other packages."""
        super().__init__(prog=prog, allow_abbrev=False, formatter_class=_HelpFormatter, add_help=False)
        self._groups = {title: self.add_argument_group(title) for title in groups or ()}
        self._title_of = {name: title for title, names in (groups or {}).items() for name in names}
        self._library = library
        self.dataclass_types: Any = list(classes)
        for options in self.dataclass_types:
            self._options = options
            self._add_dataclass_arguments(options)
        for name in () if library is None else library.names():
            self._group(name).add_argument(
                *_spellings(name),
                dest=name,
                nargs="*",
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=self._library_help(name),
            )
        self.add_argument("--config", metavar="FILE", help="A YAML file of options; the command line overrides it.")
        about_threads = "CPU threads. Default: 1 for models below 20 million parameters, otherwise PyTorch's choice."
        self.add_argument("--threads", metavar="INT", help=about_threads)
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")
        about_all = argparse.SUPPRESS if library is None else "Show the other options of TRL and PEFT, too."
        self.add_argument("--help-all", action="help", help=about_all)
        self.add_argument("--list-options", action=_ListOptions, nargs=0, help=argparse.SUPPRESS)
        self._arrange(groups or {})

    def _arrange(self, groups: Mapping[str, Sequence[str]]) -> None:
        """Put options in the order of their group's names, and the general ones last."""
        for title, names in groups.items():
            self._groups[title]._group_actions.sort(key=lambda action: names.index(action.dest))
        self._action_groups.append(self._action_groups.pop(self._action_groups.index(self._optionals)))
        named = [action for action in self._actions if not action.option_strings]
        positional = [f"[{of.dest.upper()}]" if of.nargs == "?" else of.dest.upper() for of in named]
        self.usage = " ".join(["%(prog)s", *positional, "[OPTIONS]"])

    def _group(self, name: str) -> argparse._ArgumentGroup:
        is_ours = self._options.__module__.startswith("sails_align.")
        summary = str(self._options.__doc__).split("\n")[0].rstrip(".")
        title = self._title_of.get(name) or (summary if is_ours else f"others of {self._options.__name__}")
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title]

    def _library_help(self, name: str) -> str:
        return argparse.SUPPRESS if self._library is None else self._library.shown.get(name, argparse.SUPPRESS)

    def _parse_dataclass_field(self, parser: Any, field: Any) -> None:  # pyright: ignore -- TRL's is static
        group, n_before = self._group(field.name), len(self._actions)
        if "positional" in field.metadata:
            kind = next(iter(get_args(field.type)), field.type)  # of `Path | None`, Path
            optional = {} if field.default is MISSING else {"nargs": "?", "default": field.default}
            group.add_argument(field.name, help=field.metadata["help"], type=kind, **optional)
            return
        TrlParser._parse_dataclass_field(group, field)  # pyright: ignore[reportArgumentType]
        action, *opposite = self._actions[n_before:]
        if self._library is not None and not self._options.__module__.startswith("sails_align."):
            action.help = self._library_help(field.name)
        for no_name in opposite:  # --no_NAME would make the list half as long again, with the help of --NAME
            no_name.help = argparse.SUPPRESS

    def describe(self, texts: Mapping[str, str]) -> None:
        """Replace the help of some options, by name."""
        for action in self._actions:
            if action.help != argparse.SUPPRESS:
                action.help = texts.get(action.dest, action.help)

    def names(self) -> set[str]:
        """Return all spellings of all options."""
        return {name for action in self._actions for name in action.option_strings}


class _HelpFormatter(argparse.HelpFormatter):
    """Show one spelling of each option, the kind of its value, and its default if it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return action.dest.upper()
        names = [name for name in action.option_strings if "-" not in name[2:]] or action.option_strings
        values = {0: "", "+": " {0} ..."}.get(action.nargs, " {0}")
        return ", ".join(names) + values.format(action.metavar or _kind(action))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        has_default = bool(action.option_strings) and action.default not in (None, argparse.SUPPRESS, [])
        if not has_default or "default" in text.lower():
            return text
        negation = f"; --no_{action.dest} turns it off" if action.default is True else ""
        return f"{text} (default: %(default)s{negation})"


def _kind(action: argparse.Action) -> str:
    """Return the name of an option's kind of value in help."""
    name = getattr(action.type, "__name__", "str")
    return {"string_to_bool": "BOOL", "int": "INT", "float": "FLOAT", "str": "TEXT", "Path": "PATH"}.get(name, "VALUE")


class _ListOptions(argparse.Action):
    """Print, for shell completion, each option and, after a tab, its values if they are known."""

    def __call__(self, parser: Any, *_: Any) -> None:
        for action in parser._actions:
            if action.help != argparse.SUPPRESS and action.option_strings:
                values = ("true", "false") if _kind(action) == "BOOL" else action.choices or ()
                print(max(action.option_strings, key=len), " ".join(map(str, values)), sep="\t")
        parser.exit()


def _set_threads(given: str) -> None:
    """Set the number of CPU threads for every model (`models.threads`); torch reads the variable on its import."""
    if not given.isdecimal() or int(given) < 1:
        raise InputError(f"threads is {given!r}, but it must be a whole number of at least 1; correct it")
    os.environ["OMP_NUM_THREADS"] = given


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _check_texts(parsed: Sequence[Any]) -> None:
    """Refuse lists and null for our text options, which argparse takes from a YAML file as they are."""
    for options in parsed:
        for option in fields(options) if type(options).__module__.startswith("sails_align.") else ():
            value = getattr(options, option.name)
            # transformers' parser has taken the None out of `str | None`
            may_be_none = value is None and option.default is None
            if option.type in (str, str | None) and not isinstance(value, str) and not may_be_none:
                raise InputError(f"{option.name} is {value!r}, but it must be a text; correct it")


def _closest(name: str, known: Iterable[str]) -> str:
    near = closest(name, known)
    return f"; did you mean {near}?" if near else "; remove it (--help lists the options)"


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        hint = did_you_mean_path(path) or "; check the path"
        raise InputError(f"cannot read the configuration {path}: {error.strerror}{hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise InputError(f"{path} is not YAML ({where}); correct it") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{path} is not a YAML mapping of option: value; write a line like `learning_rate: 0.001`")
    return values
