"""Print tables that fit the terminal: words stay whole, and cells are shown as they are (no markup is obeyed).

A table that is too wide gets narrower in steps: headings wrap, then texts, then numbers, and the vertical lines go. At
last each row becomes a paragraph with the heading before each value.
"""

from collections.abc import Iterable, Iterator, Sequence

from rich.box import HEAVY_HEAD, SIMPLE_HEAD, Box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

GAPS = {HEAVY_HEAD: (4, 3), SIMPLE_HEAD: (0, 2)}
"""Of each box: columns of the terminal at the edges, and between two columns of the table."""


class FittedTable:
    """A table that rich prints as wide as the terminal allows."""

    def __init__(
        self,
        title: str,
        headings: Sequence[str],
        rows: Iterable[Sequence[str]] = (),
        *,
        n_texts: int = 1,
        caption: str | None = None,
    ) -> None:
        """Make a table whose first columns are texts, left-aligned, and the others numbers, right-aligned.

        Args:
            title: printed above it.
            headings: of the columns.
            rows: its first rows.
            n_texts: number of the columns of texts.
            caption: printed below it.
        """
        self.title, self.headings, self.n_texts, self.caption = title, headings, n_texts, caption
        self._rows: list[Sequence[str]] = list(rows)
        self._section_ends: set[int] = set()

    def add_row(self, *cells: str) -> None:
        """Add a row."""
        self._rows.append(cells)

    def add_section(self) -> None:
        """Draw a line below the last row."""
        self._section_ends.add(len(self._rows) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield the title, the table in the first form that fits, and the caption."""
        yield Text(self.title, style="italic")
        yield from self._body(options.max_width)
        if self.caption is not None:
            yield Text(self.caption, style="dim")

    def _body(self, room: int) -> Iterable[RenderableType]:
        for numbers_wrap in (False, True):
            for texts_wrap in (False, True):
                for box, (edges, gap) in GAPS.items():
                    free = room - edges - gap * (len(self.headings) - 1)
                    widths = self._widths(free, texts_wrap=texts_wrap or numbers_wrap, numbers_wrap=numbers_wrap)
                    if widths is not None:
                        return [self._table(box, widths)]
        return self._paragraphs()

    def _widths(self, free: int, *, texts_wrap: bool, numbers_wrap: bool) -> list[int] | None:
        """Return the width of each column, the widest ones cut first; None if a word (or a whole cell) is wider."""
        widths, least = [], []
        for place, heading in enumerate(self.headings):
            cells = [row[place] for row in self._rows]
            may_wrap = texts_wrap if place < self.n_texts else numbers_wrap
            widths.append(max(map(cell_len, (heading, *cells))))
            parts = [*heading.split(), *(word for cell in cells for word in (cell.split() if may_wrap else [cell]))]
            least.append(max(map(cell_len, parts), default=0))
        while sum(widths) > free:
            wider = [place for place, width in enumerate(widths) if width > least[place]]
            if not wider:
                return None
            widths[max(wider, key=widths.__getitem__)] -= 1
        return widths

    def _table(self, box: Box, widths: Sequence[int]) -> Table:
        has_lines = box is HEAVY_HEAD
        table = Table(box=box, pad_edge=has_lines, show_edge=has_lines, padding=(0, 1) if has_lines else (0, 0, 0, 1))
        for place, (heading, width) in enumerate(zip(self.headings, widths, strict=True)):
            table.add_column(Text(heading), justify="left" if place < self.n_texts else "right", width=width)
        for place, row in enumerate(self._rows):
            table.add_row(*map(Text, row), end_section=place in self._section_ends)
        return table

    def _paragraphs(self) -> Iterator[RenderableType]:
        for first, *others in self._rows:
            yield Text(first, style="bold")
            named = [f"{name}: {cell}" for name, cell in zip(self.headings[1:], others, strict=True) if cell]
            yield Padding(Text("; ".join(named)), (0, 0, 0, 2))
