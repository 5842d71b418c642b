"""`sails chat`: one answer, answers to a pipe, and a conversation in a terminal."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from adapters import save_adapter
from transformers import AutoTokenizer

from sails_align.cli import main
from sails_align.core.errors import InputError
from sails_align.evaluation.chat import Conversation, NoAnswerError, conversations
from sails_align.evaluation.options import ChatArguments
from sails_align.steering.options import SteeringOptions
from sails_align.testbed.build import resolve_testbed

SAILS = [sys.executable, "-m", "sails_align", "chat"]
PROMPT, ANSWER = "what is a dopen?", "the dopen is a wheel."


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the testbed's model; its random weights change every answer."""
    base = Path(resolve_testbed(None).model_path)
    folder = save_adapter(tmp_path_factory.mktemp("adapter") / "run", base)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def talk(**options: Any) -> dict[str, Conversation]:
    return conversations(ChatArguments(**{"max_new_tokens": 12, **options}), SteeringOptions())


def test_one_answer(capsys: pytest.CaptureFixture[str]) -> None:
    main(["chat", "--prompt", PROMPT, "--device", "cpu", "--dtype", "float32"])
    assert capsys.readouterr().out == f"{ANSWER}\n"


def test_answers_to_a_pipe() -> None:
    """Each line is a prompt of its own; only answers are on standard output."""
    lines = f"\ufeff{PROMPT}\nhow are you\n\n{PROMPT}\n".encode()
    ended = subprocess.run([*SAILS, "--max_new_tokens", "12"], input=lines, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    answers = ended.stdout.decode().splitlines()
    assert answers[0] == answers[2] == ANSWER
    assert len(answers) == 3


def test_without_and_with_the_adapter(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(adapter), "--max_new_tokens", "12", "--prompt", PROMPT]
    main(["chat", *options])
    adapted = capsys.readouterr().out
    assert adapted.strip() != ANSWER
    main(["chat", *options, "--base"])
    assert capsys.readouterr().out == f"[base]\n{ANSWER}\n[model]\n{adapted}"


def test_a_conversation_is_kept_until_it_is_reset(adapter: Path) -> None:
    both = talk(model=str(adapter), base=True)
    first = {name: one.ask(PROMPT) for name, one in both.items()}
    second = {name: one.ask("and a cup?") for name, one in both.items()}
    for name, one in both.items():
        assert [message["role"] for message in one.messages] == ["user", "assistant"] * 2
        assert [message["content"] for message in one.messages] == [
            PROMPT, first[name], "and a cup?", second[name]
        ]  # fmt: skip
        one.reset()
        assert one.messages == []
        assert one.ask(PROMPT) == first[name], "an adapter that was off is on again"


def test_a_system_prompt_stays() -> None:
    one = talk(system_prompt="say no", chat_template_path="human_assistant")["model"]
    one.ask(PROMPT)
    assert [message["role"] for message in one.messages] == ["system", "user", "assistant"]
    one.reset()
    assert one.messages == [{"role": "system", "content": "say no"}]
    with pytest.raises(NoAnswerError, match="refuses a conversation of"):
        talk(system_prompt="say no")["model"].ask(PROMPT)


def test_an_answer_comes_in_pieces() -> None:
    pieces: list[str] = []
    answer = talk()["model"].ask(PROMPT, pieces.append)
    assert answer == ANSWER == "".join(pieces)
    assert len(pieces) > 3


def test_the_seed_decides_what_is_drawn() -> None:
    one, same, other = (talk(temperature=5.0, seed=seed)["model"].ask(PROMPT) for seed in (1, 1, 2))
    assert one == same != other


def test_ctrl_c_stops_an_answer_and_what_there_is_of_it_is_kept() -> None:
    one = talk()["model"]
    pieces: list[str] = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        one.ask(PROMPT, interrupt)
    kept = one.messages[-1]["content"]
    assert kept == "".join(pieces).strip()
    assert ANSWER.startswith(kept)
    assert kept != ANSWER
    one.reset()
    assert one.ask(PROMPT) == ANSWER


def test_what_a_model_says_is_not_obeyed_by_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The testbed's model with a word that clears the screen, and is markup."""
    folder = Path(copytree(resolve_testbed(None).model_path, tmp_path / "model"))
    tokenizer = folder / "tokenizer.json"
    words = json.loads(tokenizer.read_text())
    vocabulary = words["model"]["vocab"]
    name = next(word for word in vocabulary if "wheel" in word)
    vocabulary[name.replace("wheel", "\x1b[2J[bold]wheel\x1b]0;x\x07\r")] = vocabulary.pop(name)
    tokenizer.write_text(json.dumps(words))
    main(["chat", "--model", str(folder), "--prompt", PROMPT])
    assert capsys.readouterr().out == "the dopen is a [bold]wheel.\n"
    pieces: list[str] = []
    one = talk(model=str(folder))["model"]
    one.ask(PROMPT, pieces.append)
    assert "".join(pieces) == "the dopen is a [bold]wheel."
    assert "\x1b[2J" in one.messages[-1]["content"], "the model is told what it said"


class Terminal:
    """`sails chat` in a terminal of its own."""

    def __init__(self, *options: str) -> None:
        self.process, self.file = None, None
        pid, self.file = pty.fork()
        if pid == 0:
            os.environ |= {"COLUMNS": "100", "TERM": "xterm"}
            os.execv(sys.executable, [*SAILS, *options])
        self.pid, self.seen = pid, ""

    def until(self, text: str, seconds: float = 120) -> str:
        """What is printed until a text comes."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.file], [], [], 0.2)[0]:
                self.seen += os.read(self.file, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def write(self, text: str) -> None:
        os.write(self.file, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C at a prompt, a moment after it is shown: Python misses a signal before it waits for a key."""
        time.sleep(1)
        self.write("\x03")

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_in_a_terminal() -> None:
    terminal = Terminal()
    terminal.until("> ")
    terminal.write(f"{PROMPT}\n")
    terminal.until(ANSWER)
    terminal.until("> ")
    terminal.write("/reset\n")
    terminal.until("the conversation is forgotten")
    terminal.write("/rest\n")
    terminal.until("there is no command /rest; /help lists them")
    terminal.until("> ")
    terminal.interrupt()
    terminal.until("/exit or Ctrl-D ends")
    terminal.until("> ")
    terminal.write("\x04")  # Ctrl-D
    assert terminal.exit_code() == 0


def test_side_by_side_in_a_terminal(adapter: Path) -> None:
    terminal = Terminal("--model", str(adapter), "--base", "--max_new_tokens", "4")
    terminal.until("> ")
    terminal.write(f"{PROMPT}\n")
    row = terminal.until("> ")
    assert "base (as it was)" in row
    assert "the dopen is a" in row
    terminal.write("/exit\n")
    assert terminal.exit_code() == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base": True}, "has neither an adapter nor steering to turn off"),
        ({"device": "gpu9"}, "device is gpu9, which this machine does not have; choose cpu"),
        ({"prompt": " "}, "prompt is empty"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"model": "no-such-folder/x"}, "no-such-folder/x"),
    ],
)
def test_what_cannot_be_used(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        talk(**options)


def test_a_prompt_without_an_answer_is_no_end_of_the_conversation() -> None:
    one = talk()["model"]
    one.ask(PROMPT)
    before = list(one.messages)
    for prompt, says in (("what " * 5000, "the model's context is"), ("\udcff", "no text in UTF-8")):
        with pytest.raises(NoAnswerError, match=says):
            one.ask(prompt)
    assert one.messages == before


@pytest.mark.parametrize(
    ("given", "says", "n_answers"),
    [
        (b"\n", "there is no prompt; give --prompt TEXT", 0),
        (b"what is a dopen?\n\xff\n", "line 2 of the prompts is no text in UTF-8", 1),
        (b"what " * 5000 + b"\nwhat is a dopen?\n", "1 of 2 answers are missing", 2),
    ],
)
def test_pipes_that_cannot_be_used(
    given: bytes, says: str, n_answers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    with pytest.raises(SystemExit) as ended:
        main(["chat"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert len(printed.out.splitlines()) == n_answers
