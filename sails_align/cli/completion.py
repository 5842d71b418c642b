"""The command `sails completion`: shell completion of commands, options and their values.

eval "$(sails completion bash)"                                    in ~/.bashrc; zsh likewise
sails completion fish > ~/.config/fish/completions/sails.fish

The scripts call `sails __complete WORD...` with the words up to the cursor, so they always fit the installed version.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field

from sails_align.cli import COMMANDS, GROUPS
from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.options import check_choices

SCRIPTS = {
    "bash": """\
_sails() {
    mapfile -t COMPREPLY < <(sails __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -F _sails sails""",
    "zsh": """\
#compdef sails
_sails() {
    local -a found
    found=("${(@f)$(sails __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -a found; else _files; fi
}
compdef _sails sails""",
    "fish": """\
complete -c sails -a '(sails __complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'""",
}


@dataclass(frozen=True)
class CompletionOptions:
    """The shell."""

    shell: str = field(metadata={"help": f"One of {', '.join(SCRIPTS)}.", "positional": True})

    def __post_init__(self) -> None:
        check_choices(self, {"shell": tuple(SCRIPTS)})


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Print a shell's completion script."""
    (options,) = CommandLine.read(argv).parse([CompletionOptions], prog=prog)
    print(SCRIPTS[options.shell])


def complete(words: Sequence[str]) -> None:
    """Print completions of the last word: commands, options, or values of an option; nothing for files."""
    *before, word = words or [""]
    n_words = 2 if before and before[0] in GROUPS else 1
    if len(before) < n_words:
        start = "".join(f"{given} " for given in before)
        found = [name.removeprefix(start).split()[0] for name in COMMANDS.names() if name.startswith(start)]
    else:
        values = _options(" ".join(before[:n_words]))
        option = "--" + before[-1].removeprefix("--").replace("-", "_")
        found = list(values) if word.startswith("-") else values.get(option, [])
    print(*dict.fromkeys(name for name in found if name.startswith(word)), sep="\n")


def _options(command: str) -> dict[str, list[str]]:
    """Return the options of a command, each with its values if these are known."""
    listed = io.StringIO()
    try:
        with redirect_stdout(listed):
            COMMANDS.get(command)(["--list-options"], prog="")
    except SystemExit:  # as after --help
        pass
    except InputError:  # there is no such command
        return {}
    lines = [line.partition("\t") for line in listed.getvalue().splitlines()]
    return {name: values.split() for name, _, values in lines}
