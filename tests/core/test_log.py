"""What a command says: lines on standard error, results on standard output, and all of it in the log file."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sails_align.core import log
from sails_align.core.errors import InputError, exit_on_input_error
from sails_align.core.log import LOG_FILE, Stages, log_file, note, say, show


def lines_of(folder: Path) -> list[str]:
    """The lines of a log file without their times."""
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in (folder / LOG_FILE).read_text().splitlines()]


def test_the_log_file_has_all_that_is_said(tmp_path, capsys):
    with log_file(tmp_path, "sails work"), Stages(("model", "data")) as stages:
        stages.begin("model", "a [small] one")
        stages.begin("data")
        note("for the file alone")
        logging.getLogger("sails_align.data").warning("%d rows are left out", 3)
        show("adapter   [runs]/x")
    printed = capsys.readouterr()
    assert printed.out == "adapter   [runs]/x\n"
    assert printed.err.splitlines()[:2] == ["1/2 model: a [small] one", "2/2 data"]
    assert "for the file alone" not in printed.err
    assert lines_of(tmp_path)[1:] == [
        "1/2 model: a [small] one",
        "2/2 data",
        "for the file alone",
        "warning: 3 rows are left out [sails_align.data]",
        "adapter   [runs]/x",
    ]
    say("later")
    assert "later" not in (tmp_path / LOG_FILE).read_text()


def test_a_second_command_in_the_folder_is_added(tmp_path):
    for command in ("first", "second"):
        with log_file(tmp_path, command):
            say(f"line of the {command}")
    assert [line for line in lines_of(tmp_path) if line.startswith("line")] == [
        "line of the first",
        "line of the second",
    ]


def test_the_error_that_ends_a_command_is_in_the_log(tmp_path):
    def fail() -> None:
        (tmp_path / "run.json").touch()
        raise InputError("tau is 2.0; choose 1")

    with pytest.raises(InputError), log_file(tmp_path, "sails work"):
        fail()
    assert lines_of(tmp_path)[-1] == "error: tau is 2.0; choose 1"
    with pytest.raises(ZeroDivisionError), log_file(tmp_path, "sails work"):
        say(str(1 // 0))
    assert "Traceback (most recent call last):" in (tmp_path / LOG_FILE).read_text()
    assert lines_of(tmp_path)[-1].startswith("ZeroDivisionError")


def test_bad_input_that_changes_nothing_leaves_the_log_as_it_was(tmp_path):
    def fail() -> None:
        with pytest.raises(InputError), log_file(tmp_path, "sails work"):
            raise InputError("no such model")

    fail()
    assert not list(tmp_path.iterdir())
    with log_file(tmp_path, "sails work"):
        (tmp_path / "run.json").touch()
    before = (tmp_path / LOG_FILE).read_text()
    fail()
    assert (tmp_path / LOG_FILE).read_text() == before


def test_a_stage_that_is_silent_says_that_it_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "SECONDS_OF_SILENCE", 0.0)
    with Stages(("data", "training")) as stages:
        stages.begin("data", "a large file")
        stages._ended.wait(1.5)
    assert re.search(r"^still at 1/2 data, after 0:00:0\d$", capsys.readouterr().err, re.MULTILINE)


def test_only_the_first_process_speaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with log_file(tmp_path, "sails work"):
        say("from the second")
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


WARNINGS = """
import logging, warnings
from pathlib import Path
from sails_align.core.log import log_file, set_up
set_up()
set_up()
with log_file(Path({folder!r}), "sails work"):
    logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU ...")
    warnings.warn("'pin_memory' argument is set as true but no accelerator is found")
    logging.getLogger("trl.trainer").warning("the chat template has no end of turn")
    logging.getLogger("sails_align.subspace").info("for the file alone")
    warnings.warn("the tokenizer has changed", UserWarning)
"""


def test_noise_of_libraries_is_in_the_file_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WARNINGS.format(folder=str(tmp_path))], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "warning: the chat template has no end of turn",
        "warning: UserWarning: the tokenizer has changed",
    ]
    written = (tmp_path / LOG_FILE).read_text()
    for part in ("Setting accelerator", "pin_memory", "end of turn", "for the file alone", "has changed"):
        assert part in written


@pytest.mark.parametrize("full_from", ["the first line", "a later line", "a table", "a warning"])
def test_a_full_disk_is_an_error_that_says_so(tmp_path, full_from):
    """/dev/full takes no byte. What is there stays there."""
    (tmp_path / "results.json").write_text("{}")
    if full_from == "the first line":
        (tmp_path / LOG_FILE).symlink_to("/dev/full")
    says = {
        "the first line": lambda: None,
        "a later line": lambda: say("a line"),
        "a table": lambda: show("a table"),
        "a warning": lambda: logging.getLogger("sails_align.data").warning("a warning"),
    }[full_from]
    says_so = pytest.raises(InputError, match=r"cannot write .*log.txt: No space left on device; free some space")
    with says_so, log_file(tmp_path, "sails work"):
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, log._files[-1].fileno())
        os.close(full)
        says()
    assert (tmp_path / "results.json").read_text() == "{}"
    assert not log._files


def test_a_full_disk_that_nothing_else_names(capsys):
    """Such as of a figure, which a library writes."""
    with pytest.raises(SystemExit) as ended, exit_on_input_error(), open("/dev/full", "w") as file:
        file.write("x" * 10**6)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: No space left on device; free some space, or choose another disk\n"
