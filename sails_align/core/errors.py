"""The one exception a user is meant to see, and how a command ends on it."""

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one to three lines: the value, why it cannot be used, and what to do instead.
    """


def without_password(text: str) -> str:
    """A text that may be shown: URLs in it are without user and password."""
    return re.sub(r"(\w://)[^/\s@]*@", r"\1", text)


class CommandParser(argparse.ArgumentParser):
    """Errors are `InputError`s, without argparse's usage text, which for hundreds of options fills the screen."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the options")


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """End the process with the message on standard error and exit code 2, without a traceback, on an `InputError`.

    On Ctrl-C, with exit code 130.
    """
    try:
        yield
    except InputError as error:
        if _is_first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None  # 128 + the signal's number, as shells have it


def _is_first_to_say(message: str) -> bool:
    """Whether no other process of this launch has this message: what one cannot use, mostly none of them can.

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
