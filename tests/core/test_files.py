"""Locks: who comes second waits, or is told; a killed process holds none."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from sails_align.core import files
from sails_align.core.errors import InputError
from sails_align.core.files import set_aside, write_text

HOLDER = """
import sys, time
from pathlib import Path
from sails_align.core.files import work_folder
with work_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_one_processs_until_that_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process is at work in"), files.work_folder(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    with files.work_folder(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


def test_a_timeout_within_the_block_is_not_taken_for_the_folders(tmp_path):
    with pytest.raises(filelock.Timeout), files.work_folder(tmp_path):
        raise filelock.Timeout("another.lock")


def test_file_systems_without_locks_are_worked_on_all_the_same(tmp_path, monkeypatch):
    def refuse(self, *args, **options):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with files.exclusive(tmp_path / "x.lock"):
        pass


def test_what_took_the_place_of_a_folder_stays_if_something_fails_after_that(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    write_text(folder / "old", "")

    def fail_after_the_new_one() -> None:
        with set_aside(folder):
            write_text(folder / "new", "")
            (folder / "lacking").unlink()

    with pytest.raises(FileNotFoundError):
        fail_after_the_new_one()
    assert [path.name for path in folder.iterdir()] == ["new"]
    with pytest.raises(FileNotFoundError), set_aside(folder):
        (folder / "lacking").unlink()
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
