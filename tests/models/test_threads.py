"""Small models are computed on one thread, and the caller's number of threads is restored."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from sails_align.cli import main
from sails_align.models import threads
from sails_align.models.hooks import evaluation_mode
from sails_align.models.threads import OVERRIDE, fitting_threads, threads_for


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable of the user's, and another number of threads than any that is chosen."""
    monkeypatch.delenv(OVERRIDE, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_small_model_gets_one_thread_and_the_callers_number_is_restored():
    with fitting_threads(nn.Linear(4, 4)):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    with evaluation_mode(nn.Linear(4, 4)):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_the_number_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), fitting_threads(nn.Linear(4, 4)):
        print(1 // 0)
    assert torch.get_num_threads() == 3


def test_a_large_model_keeps_all_threads(monkeypatch):
    assert (threads_for(threads.SMALL - 1), threads_for(threads.SMALL)) == (1, 3)
    monkeypatch.setattr(threads, "SMALL", 10)
    with fitting_threads(nn.Linear(4, 4)):
        assert torch.get_num_threads() == 3


def test_openmps_variable_overrides_the_choice(monkeypatch):
    monkeypatch.setenv(OVERRIDE, "3")
    with fitting_threads(nn.Linear(4, 4)):
        assert torch.get_num_threads() == 3


def test_the_option_threads_overrides_the_choice():
    command = "from sails_align.cli import main; main(['completion', 'bash', '--threads', '2']);"
    command += "from sails_align.models.threads import threads_for as n; print(n(1), n(10**9))"
    environment = {name: value for name, value in os.environ.items() if name != OVERRIDE}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "2 2"


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5"])
def test_a_number_of_threads_that_cannot_be_used(capsys, given):
    with pytest.raises(SystemExit) as ended:
        main(["train", "sft", "--threads", given])
    assert ended.value.code == 2
    assert f"threads is '{given}', but it must be a whole number of at least 1" in capsys.readouterr().err
