"""What tests of published results share: the tables of pages, and the rows and columns that hold the same number."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"

Table = dict[str, dict[str, str]]
COLUMNS = {
    "safety, trained categories": "safety rate, trained categories (%)",
    "safety, held-out categories": "safety rate, held-out categories (%)",
    "mean harmfulness, 1 to 5": "harmfulness (1-5)",
    "harmless, but no refusal": "harmless, but no refusal (%)",
    "over-refusal": "over-refusal (%)",
    "correct answers": "correct answers (%)",
    "mean of safety and correct answers": "mean of safety and helpfulness (%)",
    "safety left after benign training": "safety left after benign training (%)",
    "safety left after harmful training": "safety left after harmful training (%)",
}
"""Row of a method's table -> column of the report."""
MEAN_ON_SMOLLM2 = "mean of refusal rate and likeness (%)"

KEPT = "safety and helpfulness kept (%)"
KEPT_ON_SMOLLM2 = KEPT.replace("safety", "refusals")
TAMPERING_COLUMNS = COLUMNS | {
    "score of the new task": "score of the new task (%)",
    "change of the weights": "change of the weights (%)",
    "safety and task kept": KEPT,
    "safety and correct answers kept": KEPT,
    "refusals, trained categories": "refusal rate, trained categories (%)",
    "refusals, held-out categories": "refusal rate, held-out categories (%)",
    "refusals and task kept": KEPT_ON_SMOLLM2,
}


def tables_of(page: str, section: str = "") -> list[tuple[list[str], Table]]:
    """Return the tables of a page (or of its section of that title): headings, and row -> heading -> entry."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if section:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = (
            [entry.strip() for entry in line.strip().strip("|").split("|")] for line in block.splitlines()
        )
        by_name = {row[0].replace(" (unstable)", ""): dict(zip(head, row, strict=True)) for row in rows}
        found.append((head, by_name))
    return found


def by_first_heading(page: str, section: str = "") -> dict[str, Table]:
    return {head[0]: rows for head, rows in tables_of(page, section)}
