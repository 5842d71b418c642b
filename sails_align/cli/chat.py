"""The command `sails chat`: talk to a model.

sails chat --model runs/sft-sails-testbed            in the terminal: /reset forgets, /exit or Ctrl-D ends
sails chat --model runs/sft-sails-testbed --base     each prompt is answered without and with the adapter, side by side
sails chat --model testbed --prompt TEXT             one answer
sails chat --model testbed < prompts.txt             one answer for each line, which is a conversation of its own
"""

import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.evaluation.options import ChatArguments
from sails_align.steering.options import SteeringOptions

if TYPE_CHECKING:
    from sails_align.evaluation.chat import Conversation

COMMANDS = {"/reset": "forget the conversation", "/exit": "end (or Ctrl-D)", "/help": "show this"}
TITLES = {"base": "base (as it was)", "model": "model"}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Answer `--prompt`, or else the lines of a pipe, or else talk in the terminal."""
    options, steering = CommandLine.read(argv).parse([ChatArguments, SteeringOptions], prog=prog)
    from sails_align.evaluation.chat import conversations

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # answers may have characters that a terminal's encoding lacks
    talks = conversations(options, steering)
    if options.prompt is not None:
        _answer_all([options.prompt], talks)
    elif sys.stdin.isatty():
        _talk(options.model, talks)
    else:
        _answer_all(_lines(), talks)


def _lines() -> Iterator[str]:
    """Read prompts from the pipe as they come, one a line; empty lines are none."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"line {number} of the prompts is no text in UTF-8; write them in UTF-8") from error
        if text.strip():
            yield text.strip()


def _answer_all(prompts: Iterable[str], talks: Mapping[str, "Conversation"]) -> None:
    """Print the answer to each prompt, and nothing else on standard output."""
    from sails_align.evaluation.chat import NoAnswerError

    n = n_unanswered = 0
    with suppress(BrokenPipeError):  # of `| head`
        for prompt in prompts:
            n += 1
            for name, talk in talks.items():
                talk.reset()
                try:
                    answer = talk.ask(prompt)
                except NoAnswerError as error:
                    n_unanswered += 1
                    print(f"prompt {n}: {error}", file=sys.stderr, flush=True)
                    answer = ""
                print(answer if len(talks) == 1 else f"[{name}]\n{answer}", flush=True)
    if not n:
        raise InputError("there is no prompt; give --prompt TEXT, or one prompt a line on standard input")
    if n_unanswered:
        raise InputError(f"{n_unanswered} of {n * len(talks)} answers are missing, for the reasons above")


def _talk(name: str, talks: Mapping[str, "Conversation"]) -> None:
    """Talk in the terminal until the user ends it."""
    from sails_align.core.text import printable
    from sails_align.evaluation.chat import NoAnswerError

    with suppress(ImportError):
        import readline  # noqa: F401 -- lines can then be edited, and earlier ones found again
    print(f"{printable(name)}: write a prompt. /help lists the commands; Ctrl-C stops an answer.")
    while (prompt := _read()) not in (None, "/exit"):
        assert prompt is not None
        if prompt == "/reset":
            for talk in talks.values():
                talk.reset()
            print("the conversation is forgotten")
        elif prompt == "/help":
            print(*(f"{command:<8}{what}" for command, what in COMMANDS.items()), sep="\n")
        elif re.fullmatch(r"/\w+", prompt):
            print(f"there is no command {printable(prompt)}; /help lists them")
        elif prompt:
            try:
                _stream(prompt, talks["model"]) if len(talks) == 1 else _side_by_side(prompt, talks)
            except NoAnswerError as error:
                print(f"{printable(str(error))}\n/reset starts again", file=sys.stderr, flush=True)


def _read() -> str | None:
    """Read a line; empty on Ctrl-C, None at the end."""
    try:
        return input("> ").strip()
    except KeyboardInterrupt:
        print("\n/exit or Ctrl-D ends")
        return ""
    except EOFError:
        print()
        return None


def _stream(prompt: str, talk: "Conversation") -> None:
    """Print an answer as it comes."""

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    try:
        talk.ask(prompt, show)
        print()
    except KeyboardInterrupt:
        print(" (stopped)")


def _side_by_side(prompt: str, talks: Mapping[str, "Conversation"]) -> None:
    """Print the answers to a prompt in columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, answers = Console(), []
    for name, talk in talks.items():
        pieces: list[str] = []
        with console.status(f"{name} answers"):
            try:
                answers.append(talk.ask(prompt, pieces.append))
            except KeyboardInterrupt:
                answers.append("".join(pieces) + " (stopped)")
    table = Table(expand=True)
    for name in talks:
        table.add_column(TITLES[name], ratio=1, overflow="fold")
    table.add_row(*map(Text, answers))
    console.print(table)
