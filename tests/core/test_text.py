"""Texts of models are printed as data."""

import pytest

from sails_align.core.text import PrintableStream, printable

HARMFUL = [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b]0;title\x07after", "after"),
    ("\x1b]8;;https://example.com\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1b]52;c;cm0gLXJm\x07copied", "copied"),
    ("\x9b2Jcleared", "cleared"),
    ("\x1bcreset", "reset"),
    ("over\rwritten\b\b", "overwritten"),
    ("bell\a and null\0", "bell and null"),
    ("a\u202eb", "ab"),
    ("half \ud83d", "half \ufffd"),
    ("lines\n\tand tabs, \u00e9, \U0001f600, [bold]no markup[/bold]",) * 2,
]


@pytest.mark.parametrize(("text", "shown"), HARMFUL)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(("text", "shown"), HARMFUL)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_in_pieces(text: str, shown: str, size: int) -> None:
    stream = PrintableStream()
    pieces = [stream.add(text[start : start + size]) for start in range(0, len(text), size)]
    assert "".join([*pieces, stream.add("", is_last=True)]) == shown


def test_a_sequence_that_never_ends_is_no_sequence() -> None:
    stream = PrintableStream()
    assert stream.add("before \x1b]0;") == "before "
    assert stream.add("x" * 5000).endswith("x" * 5000)
    stream.add("\x1b[3")
    assert stream.add("", is_last=True) == "[3"
