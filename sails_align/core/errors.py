"""Define the exception for bad input, and how a command exits on it."""

import argparse
import errno
import hashlib
import os
import re
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from sails_align.core.suggestions import suggestion


class InputError(ValueError):
    """Bad input from the user.

    The message is one to three lines: the value, why it cannot be used, and what to do instead.

    Examples:
        >>> sails.load_prompts("no such set")
        Traceback (most recent call last):
        ...
        sails_align.core.errors.InputError: ...
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def root_cause(error: BaseException) -> BaseException:
    """Return the error that an error was raised from, at last."""
    return error if error.__cause__ is None else root_cause(error.__cause__)


def without_password(text: str) -> str:
    """Remove user names and passwords from the URLs in a text."""
    return re.sub(r"(\w://)[^/\s@]*@", r"\1", text)


class CommandParser(argparse.ArgumentParser):
    """Raise `InputError` on bad arguments, without argparse's usage text: it is too long for hundreds of options."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the options")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        check_value(action, value)


def check_value(action: argparse.Action, value: object, where: str = "") -> None:
    """Raise `InputError` if a value is not one of an option's choices; `where` is the file that it comes from."""
    if action.choices is not None and value not in action.choices:
        names = [str(getattr(choice, "value", choice)) for choice in action.choices]
        text = str(getattr(value, "value", value))
        hint = suggestion(text, names)
        raise InputError(f"{where}{action.dest} is {text!r}, which is not one of: {', '.join(names)}{hint}")


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Print an `InputError` to standard error and exit with code 2, without a traceback; exit with 130 on Ctrl-C.

    If nobody reads standard output any more (`| head`), exit with 141 and say nothing.
    """
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        if _is_first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None  # 128 + the signal's number, as shells have it
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        if not output.poll(0):  # it is read: another pipe is broken
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        raise SystemExit(141) from None  # 128 + SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"cannot write {error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; free some space, or choose another disk", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def _is_first_to_say(message: str) -> bool:
    """Return whether no other process of this launch has printed this message yet.

    The processes of `accelerate launch` and `torchrun` share a store of the launcher's from their start.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    from datetime import timedelta

    from torch.distributed import DistError, TCPStore

    key = f"sails_error_{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5)
        )
        return store.add(key, 1) == 1
    except (DistError, RuntimeError):  # the launcher is gone already: better twice than not at all
        return True
