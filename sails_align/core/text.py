"""Cut texts, write numbers, and print texts of models and files: they are data, and a terminal must not obey them."""

import re
import unicodedata
from collections.abc import Iterable

ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x9b[0-?]*[ -/]*[@-~]"  # colours, movements of the cursor
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f]).*?(?:\x07|\x1b\\|\x9c)"  # titles, links, the clipboard
    r"|\x1b[^\[\]PX^_]",
    re.DOTALL,
)
"""ECMA-48 control sequences, as a whole."""
LONGEST_ESCAPE = 4096
KEPT = "\n\t"
REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They make a text look like another one."""


def cut_at(text: str, stops: Iterable[str]) -> str:
    """Return a text up to the first of some texts that it holds."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def printable(text: str) -> str:
    """Return a text without control sequences and control characters, other than line breaks and tabs.

    A lone surrogate, which no output can encode, becomes U+FFFD.
    """
    return "".join(map(_printable_character, ESCAPES.sub("", text)))


def _printable_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"
    return "" if (category == "Cc" and character not in KEPT) or character in REORDERING else character


def counted(n: int, what: str) -> str:
    """Return a number of things, in words."""
    return f"{n} {what}{'' if n == 1 else 's'}"


class PrintableStream:
    """Make pieces of a text printable as they come, also where a control sequence is spread over several pieces."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, piece: str, *, is_last: bool = False) -> str:
        """Return what can be printed now; the beginning of a control sequence is held back until its end is there."""
        text = ESCAPES.sub("", self._held + piece)
        start = re.search("[\x1b\x9b\x9d\x90\x98\x9e\x9f]", text)
        if is_last or start is None or len(text) - start.start() > LONGEST_ESCAPE:
            self._held = ""
            return printable(text)
        self._held = text[start.start() :]
        return printable(text[: start.start()])


_ENDS = str.maketrans({"`": "'", "|": "¦"})


def code_span(value: object) -> str:
    """Return a value as Markdown's code. What would end the span or a table's cell is replaced."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(value)).translate(_ENDS)
    return f"`{text[:200] or '?'}`"


def literal(value: object) -> str:
    """Return a value as Markdown in one line that shows it as it is, whatever marks it holds."""
    lines = printable(str(value)).splitlines()
    return "<br>".join(re.sub("[!-/:-@[-`{-~]", lambda mark: f"&#{ord(mark[0])};", line) for line in lines)
