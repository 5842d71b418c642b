"""Say what a command does: lines on standard error, and all of it in the file `log.txt` of the output folder.

A line is for the user: a numbered stage, a step, something to know. What libraries warn of reaches standard error, too,
except for what `NOISE` lists, by logger and beginning: that is only in the file.
"""

import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timedelta
from io import TextIOWrapper
from pathlib import Path
from threading import Event, Thread
from typing import TextIO

from rich.console import Console, RenderableType
from rich.text import Text

from sails_align.core.errors import InputError
from sails_align.core.files import disk_errors

LOG_FILE = "log.txt"
WIDTH_IN_FILE = 110
SECONDS_OF_SILENCE = 60.0
"""After so long without a line, one says that the work goes on."""
OURS = "sails_align"
OF_LIBRARIES = ("transformers", "datasets", "huggingface_hub", "DeepSpeed", "vllm")
"""Loggers that hand nothing on to the root logger."""
NOISE: dict[str, str] = {
    # It looks for GPUs at import; that there is none is in the first line of each training.
    "DeepSpeed": "Setting accelerator to CPU",
    # Warnings of the module `warnings`, which are written with file and line in front.
    "py.warnings": "|".join(
        (
            "Found missing adapter keys",  # `check_complete` has compared them
            "`torch.jit.script_method` is deprecated",  # within torch
            "'pin_memory' argument is set as true but no accelerator",  # the default of transformers' arguments
        )
    ),
}
"""What is no user's business: logger -> beginnings of messages, as a regular expression."""
CONSOLE = Console(stderr=True)

_files: list[TextIO] = []
_last_line = [0.0]


def is_main() -> bool:
    """Return whether this is the main process, of a launch with several the first: it alone speaks."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line on standard error, and in the log files that are open; in the main process only."""
    if is_main():
        _last_line[0] = time.monotonic()
        CONSOLE.print(text, markup=False, highlight=False, soft_wrap=True)
        note(text)


def note(text: str) -> None:
    """Write a line into the open log files only."""
    for file in _files:
        _write(file, f"{datetime.now():%H:%M:%S} {text}\n")


def _write(file: TextIO, text: str) -> None:
    with disk_errors(Path(file.name)):
        file.write(text)


def show(*parts: RenderableType) -> None:
    """Print results, a table or a line, on standard output, and into the log files that are open."""
    for file in (None, *_files):
        console = Console() if file is None else Console(file=file, width=WIDTH_IN_FILE)
        for part in parts:
            with nullcontext() if file is None else disk_errors(Path(file.name)):
                console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str | Text))


def seconds_of_silence() -> float:
    """Return the time since the last line."""
    return time.monotonic() - _last_line[0]


def duration(seconds: float) -> str:
    """Return a time as text, in whole seconds."""
    return str(timedelta(seconds=int(seconds)))


class Stages:
    """Number the stages of a command; within the block, say every now and then which one still runs."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._name, self._began, self._ended = tuple(names), "", 0.0, Event()

    def begin(self, name: str, about: str = "") -> None:
        """Say that a stage begins, and what it works on."""
        self._name, self._began = f"{self._names.index(name) + 1}/{len(self._names)} {name}", time.monotonic()
        say(f"{self._name}{': ' if about else ''}{about}")

    def __enter__(self) -> "Stages":
        Thread(target=self._speak, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _speak(self) -> None:
        while not self._ended.wait(max(1.0, SECONDS_OF_SILENCE - seconds_of_silence())):
            if self._name and seconds_of_silence() >= SECONDS_OF_SILENCE:
                with suppress(InputError):  # the next line of the main thread says it
                    say(f"still at {self._name}, after {duration(time.monotonic() - self._began)}")


@contextmanager
def log_file(folder: Path, what: str) -> Iterator[None]:
    """Keep all lines of the block in the folder's log file; also warnings, and the error that ends the block.

    Bad input that has changed nothing else in the folder leaves the log as it was, too.
    """
    if not is_main():
        yield
        return
    path, before = folder / LOG_FILE, _contents(folder)
    size = path.stat().st_size if path.is_file() else None
    with disk_errors(path):
        # Without a buffer, which would be written again, in vain, when the file is closed on a full disk.
        opened = TextIOWrapper(path.open("ab", buffering=0), encoding="utf-8", write_through=True)
    with opened as file:
        _write(file, f"{'' if size in (None, 0) else chr(10)}{what}, {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        _files.append(file)
        handler = _FileHandler(file)
        try:
            with _attached(handler):
                yield
        except BaseException as error:
            is_short = isinstance(error, InputError | SystemExit | KeyboardInterrupt)
            with suppress(InputError):  # of a full disk, which must not hide this error
                note(f"error: {error or type(error).__name__}" if is_short else traceback.format_exc().rstrip())
            if isinstance(error, InputError) and _contents(folder) == before:
                path.unlink(missing_ok=True) if size is None else os.truncate(path, size)
            raise
        finally:
            _files.remove(file)


def _contents(folder: Path) -> dict[str, int]:
    """Return when each file in a folder was changed, but for the log and the lock."""
    files = (path for path in folder.iterdir() if path.name not in (LOG_FILE, ".lock"))
    return {path.name: path.stat().st_mtime_ns for path in files}


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    loggers = [logging.getLogger(), *map(logging.getLogger, OF_LIBRARIES)]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _FileHandler(logging.Handler):
    """Write messages of loggers into a log file."""

    def __init__(self, file: TextIO) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        _write(self._file, f"{datetime.now():%H:%M:%S} {_line(record)} [{record.name}]\n")


class _ConsoleHandler(logging.Handler):
    """Print messages of loggers on standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if (is_main() and record.levelno >= logging.WARNING) or record.levelno >= logging.ERROR:
            CONSOLE.print(_line(record), markup=False, highlight=False, soft_wrap=True)


def _line(record: logging.LogRecord) -> str:
    text = record.getMessage().strip()
    if record.name == "py.warnings":  # file:line: category: message, and the line of code
        text = re.sub(r"^.*?:\d+: (\w+: )", r"\1", text).split("\n")[0]
    return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _Silence(logging.Filter):
    """Keep messages that are no user's business from standard error; the log files have them."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        if self._pattern.search(record.getMessage()) is None:
            return True
        note(f"{_line(record)} [{record.name}]")
        return False


def set_up() -> None:
    """Send warnings of all libraries to standard error as lines, and silence `NOISE`. For commands, not for the API."""
    if any(isinstance(handler, _ConsoleHandler) for handler in logging.getLogger().handlers):
        return
    _set_up_bars()
    for name, pattern in NOISE.items():
        logging.getLogger(name).addFilter(_Silence(pattern))
    logging.getLogger().addHandler(_ConsoleHandler())
    logging.getLogger(OURS).setLevel(logging.INFO)  # for the log files
    logging.captureWarnings(True)


def _set_up_bars() -> None:
    """Show other libraries' bars (tqdm's) on a terminal, if they take long; none in a file. Before tqdm is imported."""
    if sys.stderr.isatty() and is_main():
        os.environ.setdefault("TQDM_DELAY", "3")
        return
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    for name in ("TQDM_DELAY", "TQDM_MININTERVAL"):  # lm-eval switches its bars on, whatever the variables say
        os.environ.setdefault(name, "60")
