"""The one exception a user is meant to see, and how a command ends on it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one to three lines: the value, why it cannot be used, and what to do instead.
    """


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """End the process with the message on standard error and exit code 2, without a traceback, on an `InputError`."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
