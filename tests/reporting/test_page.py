"""The page: numbers as they are shown, and text that cannot act as markup."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from browser import Browser, needs_chromium
from made_results import outcome
from markupsafe import escape

from sails_align.evaluation.metrics import METRICS
from sails_align.experiments.summary import Mean
from sails_align.reporting.page import (
    NOTE,
    POLICY,
    Grid,
    Page,
    Section,
    TableCell,
    difference,
    entries,
    interval,
    number,
    write_page,
)
from sails_align.reporting.trade_offs import trade_off

SAFETY, REFUSAL = METRICS["safety_rate"], METRICS["over_refusal_rate"]


@pytest.mark.parametrize(
    ("mean", "shown"),
    [
        (Mean(0.5, 0.4, 0.6, 5), "50.0 (40.0 to 60.0)"),
        (Mean(0.5, None, None, 1), "50.0"),  # of one seed
        (Mean(None, None, None, 0), "–"),
    ],
)
def test_means(mean: Mean, shown: str) -> None:
    assert interval(mean, SAFETY) == shown


def test_numbers_have_the_digits_and_the_scale_of_their_metric() -> None:
    assert number(1234.5, METRICS["train_seconds"]) == "1,234.5"
    assert number(4.125, METRICS["harmfulness"]) == "4.12"
    assert number(0.99, METRICS["capability"]) == "99.0"


@pytest.mark.parametrize(
    ("mean", "metric", "verdict"),
    [
        (Mean(0.1, 0.05, 0.15, 5), SAFETY, "better"),
        (Mean(0.1, 0.05, 0.15, 5), REFUSAL, "worse"),
        (Mean(-0.1, -0.15, -0.05, 5), REFUSAL, "better"),
        (Mean(0.1, 0.0, 0.2, 5), SAFETY, "open"),  # it touches zero
        (Mean(0.1, None, None, 1), SAFETY, "open"),
        (Mean(None, None, None, 0), SAFETY, "open"),
    ],
)
def test_differences_are_judged_by_their_interval_and_direction(mean: Mean, metric, verdict: str) -> None:
    assert difference(mean, metric).verdict == verdict


def test_differences_have_signs() -> None:
    assert difference(Mean(0.1, -0.05, 0.25, 5), SAFETY).text == "+10.0 (-5.0 to +25.0)"


def pages(folder: Path, *sections: Section, title: str = "t", findings: Sequence[str] = ()) -> tuple[str, str]:
    html, markdown = write_page(Page(title, findings, sections, "sails compare", {"commit": "none"}), folder)
    return html.read_text(), markdown.read_text()


def test_a_page_begins_with_the_findings(tmp_path: Path) -> None:
    for page in pages(tmp_path, Section("A title"), findings=["SAILS is <better>."]):
        body = page[page.find("<body") :] if "<body" in page else page
        told = "SAILS is &lt;better&gt;." if "<body" in page else "- SAILS is &#60;better&#62;."
        assert 0 < body.index("Findings") < body.index(told) < body.index(NOTE) < body.index("A title")


def test_tables_have_titles_and_scroll_where_they_are_too_wide(tmp_path: Path) -> None:
    html, markdown = pages(
        tmp_path, Section("s", grids=[Grid(["method"], [entries("SAILS", "1.0 (0.9 to 1.1)")], "All")])
    )
    assert "<h3>All</h3>" in html
    assert '<div class="wide" tabindex="0"><table>' in html
    assert "1.0 <span>(0.9 to 1.1)</span>" in html
    assert "### All" in markdown


def test_both_pages_say_the_same(tmp_path: Path) -> None:
    grid = Grid(["method", "safety"], [[TableCell("SAILS"), TableCell("+5.0", "better")], entries("LoRA", "1.0")])
    html, markdown = pages(tmp_path, Section("A title", ["A paragraph."], [grid]))
    for page in (html, markdown):
        for words in ("A title", "A paragraph.", "SAILS", "+5.0", "LoRA", "sails compare", "commit"):
            assert words in page
    assert "| method | safety |" in markdown
    assert "| SAILS | **+5.0** better |" in markdown
    assert "| LoRA | 1.0 |" in markdown


def test_texts_do_not_act_as_markup_in_html(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    html, _ = pages(tmp_path, Section(bad, [bad], [Grid([bad], [entries(bad)])]), title=bad)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 4


def test_texts_do_not_act_as_markup_in_markdown(tmp_path: Path) -> None:
    """A prompt file's name is the heading of a table."""
    bad = "a|b <img src=x> `c` **d** [e](f)\n# g\x1b[2J"
    meaning = {"layer": 1, "id": 7, "promoted": [], "suppressed": [], "neighbours": [], "contexts": []}
    section = Section(bad, [bad], [Grid([bad, "n"], [entries(bad, "1")], bad)], (), [meaning | {"neuronpedia": bad}])
    _, markdown = pages(tmp_path, section, title=bad)
    assert not any(mark in markdown for mark in ("<img", "`c`", "**d**", "](f)", "\n# g", "\x1b"))
    head, line, row = (text for text in markdown.splitlines() if text.startswith("|"))
    assert [text.count("|") for text in (head, line, row)] == [3, 3, 3]


def test_no_script_and_no_request_is_allowed(tmp_path: Path) -> None:
    html, _ = pages(tmp_path)
    head = html[: html.index("<link")]
    assert f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">' in head
    assert "default-src 'none'" in POLICY
    assert "script-src" not in POLICY


@needs_chromium
def test_a_browser_draws_the_page_and_runs_no_script_in_it(tmp_path: Path) -> None:
    rows = outcome().rows
    picture = trade_off(rows, [row.run.name for row in rows], "trade_off")
    contexts = [{"tokens": ["hot"], "activations": [2.0]}]
    meaning = dict.fromkeys(("promoted", "suppressed", "neighbours"), ()) | {"layer": 1, "id": 7, "contexts": contexts}
    section = Section("s", pictures=[picture], meanings=[{**meaning, "neuronpedia": None}])
    html, _ = write_page(Page("t", [], [section], "sails compare"), tmp_path)
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(html)
        assert browser.value("document.images[0].naturalWidth") > 0
        assert browser.value("getComputedStyle(document.querySelector('.context span')).borderRadius") == "3px"
        assert browser.value("document.querySelector('.context span').style.getPropertyValue('--heat')") == "1.00"
        assert not browser.messages
        html.write_text(html.read_text().replace("</body>", "<script>document.title = 'run'</script></body>"))
        browser.open(html)
        assert browser.value("document.title") == "t"
        assert any("Content Security Policy" in message for message in browser.messages)
    finally:
        browser.close()


def test_tokens_of_features_are_code(tmp_path: Path) -> None:
    meaning = {
        "layer": 1,
        "id": 7,
        "promoted": ["a`b", "|"],
        "suppressed": [" "],
        "neighbours": [[3, 0.5]],
        "neuronpedia": None,
        "contexts": [{"tokens": ["<i>", "x"], "activations": [2.0, 0.5]}],
    }
    html, markdown = pages(tmp_path, Section("Features", meanings=[meaning]))
    assert "<i>" not in html
    assert "`a'b`" in markdown  # no quote ends the code
    assert "`¦`" in markdown  # nor a cell of a table
    assert "**`<i>`** `x`" in markdown  # the token with more than half of the highest activation stands out
