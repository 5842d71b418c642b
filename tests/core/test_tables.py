"""Tables fit the terminal, and no word is broken, at any width that holds the longest word."""

import pytest
from rich.console import Console

from sails_align.core.tables import FittedTable

HEADINGS = ("", "value", "95% interval", "unscored", "correct answers (%)")
ROWS = [
    ("safety rate (%), held-out categories", "91.8", "88.3 to 94.9", "0", "100.0"),
    ("over-refusal (%), dual use", "2.3", "0.8 to 4.3", "12", ""),
    ("[/b] of [red]brackets[/red]", "1", "", "", "7"),
]


def printed(width: int, n_texts: int = 1) -> str:
    console = Console(width=width, record=True, force_terminal=False)
    table = FittedTable("Safety of [/x] and more", HEADINGS, ROWS[:1], n_texts=n_texts, caption="and 2 more")
    table.add_section()
    for row in ROWS[1:]:
        table.add_row(*row)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.parametrize("width", [160, 120, 100, 80, 70, 60, 50, 40, 30, 20])
def test_words_stay_whole(width: int) -> None:
    text = printed(width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    shown = set(text.replace(";", " ").replace(":", " ").split())
    for cell in (*HEADINGS, *(cell for row in ROWS for cell in row), "Safety of [/x] and more", "and 2 more"):
        assert set(cell.split()) <= shown, cell


def test_a_table_keeps_its_form_as_long_as_it_can() -> None:
    assert "┃" in printed(100)  # nothing wraps
    assert "88.3 to 94.9" in printed(80)  # numbers are the last to wrap
    assert "┃" not in printed(60)  # without lines
    assert "95% interval: 88.3" in " ".join(printed(24).split())  # as paragraphs


def test_no_rows() -> None:
    console = Console(width=40)
    with console.capture() as captured:
        console.print(FittedTable("nothing", HEADINGS[:3]))
    assert "nothing" in captured.get()
