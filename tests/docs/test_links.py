"""Documents are whole: no placeholders, nothing left of a merge, and links lead somewhere."""

import re

import pytest
from paths import ROOT

DOCUMENTS = [path for pages in (".", "docs", "docs/methods") for path in sorted((ROOT / pages).glob("*.md"))]
FOLDERS = ("sails_align", "recipes", "eval", "tests", "benchmarks", "accelerate_configs", "docs", ".ci")
TEXTS = (".md", ".py", ".yaml", ".yml", ".toml", ".txt", ".cff", ".in", ".js", ".css", ".json", ".ipynb", "")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_placeholder_is_left_and_links_exist(document):
    text = document.read_text(encoding="utf-8")
    assert not re.search(r"\b[A-Z]+_TABLE\b|\bTODO\b", text)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_every_figure_of_a_page_is_in_the_gallery():
    shown = {}
    for document in DOCUMENTS:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
            shown.setdefault((document.parent / target).resolve(), []).append(document.name)
    assert len(shown) > 10
    assert {figure.name: pages for figure, pages in shown.items() if "gallery.md" not in pages} == {}


def test_every_page_of_a_method_says_what_the_readme_promises():
    pages = sorted((ROOT / "docs" / "methods").glob("*.md"))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "**Differences from the paper" in text, page.name
        assert re.search(r"\*\*Not supported|unsupported cases|^## Limits", text, re.MULTILINE), page.name


def test_every_page_is_in_the_navigation_of_the_site():
    """`make docs` fails for a page outside the navigation. This test finds it without building the site."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    assert len(pages) > 30
    assert [page for page in pages if f": {page}" not in navigation and f"- {page}" not in navigation] == []


def test_nothing_is_left_of_a_merge():
    in_folders = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files = [path for path in (*ROOT.iterdir(), *in_folders) if path.is_file() and path.suffix in TEXTS]
    assert len(files) > 500
    marked = [
        str(path.relative_to(ROOT))
        for path in files
        if re.search(r"^(<{7}|>{7})( |$)", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    ]
    assert not marked
