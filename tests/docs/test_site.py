"""The documentation is built as a site by mkdocs, where every warning is an error, and can be read without network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import Browser, needs_chromium
from paths import ROOT
from processes import PATIENCE

pytestmark = pytest.mark.documents

LOADED = re.compile(
    r"""<(?:script|img)\b[^>]*?\bsrc=["']?([^"'\s>]+)|<link\b[^>]*?rel=["']?stylesheet[^>]*?href=["']?([^"'\s>]+)"""
)


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """`make docs` in a copy."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def copy(folder: Path) -> Path:
    """What the site is made of."""
    for name in ("docs", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.md"), *(ROOT / name for name in ("mkdocs.yml", "LICENSE", "CITATION.cff"))):
        shutil.copy(path, folder)
    (folder / "sails_align").symlink_to(ROOT / "sails_align")
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy(tmp_path_factory.mktemp("site"))
    done = build(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "site"


def test_the_readme_is_the_home_page(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert "Quick start" in home
    assert 'href="testbed.html"' in home
    assert 'docs/testbed.md"' not in home


def test_links_to_other_files_lead_to_copies(site: Path) -> None:
    assert "files/docs/results/recovery.json" in (site / "theory.html").read_text()
    assert (site / "files/docs/results/recovery.json").read_bytes() == (
        ROOT / "docs/results/recovery.json"
    ).read_bytes()


def test_reports_are_on_the_site_as_pages_and_as_files_of_their_own(site: Path) -> None:
    link = "files/docs/results/smollm2/report.html"
    assert f'href="{link}"' in (site / "gallery.html").read_text()
    assert (site / link).read_bytes() == (ROOT / "docs/results/smollm2/report.html").read_bytes()
    assert "md-footer" in (site / "results/smollm2/report.html").read_text()


def test_links_and_pictures_exist(site: Path) -> None:
    """Also those that mkdocs does not look at: of the theme, and of files that were put there."""
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # is served from any folder, so its paths begin with /
            continue
        for link in re.findall(r"""(?:href|src)=["']([^"'#?]+)""", page.read_text()):
            if not re.match(r"https?:|mailto:|data:", link):
                assert (page.parent / unquote(link)).exists(), f"{page.relative_to(site)} has {link}"


def test_nothing_is_loaded_from_other_servers(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = [one or other for one, other in LOADED.findall(page.read_text())]
        assert loaded or "files" in page.parts  # a report without figures
        assert not [link for link in loaded if link.startswith(("http", "//"))]
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text())


KINDS_OF_PAGES = {
    "home": "index.html",
    "document": "training.html",
    "figures": "gallery.html",
    "method": "methods/gba.html",
    "tutorial": "tutorials/testbed.html",
    "reference": "api/subspace.html",
    "report": "results/smollm2/report.html",
    "report of its own": "files/docs/results/smollm2/report.html",
}


@needs_chromium
def test_a_browser_has_no_message_and_asks_no_other_host(site: Path, tmp_path: Path) -> None:
    browser = Browser(tmp_path)
    try:
        for kind, name in KINDS_OF_PAGES.items():
            browser.open(site / name)
            # The script of the theme has run, and pictures are drawn. A report of its own has no script.
            has_run = browser.value("document.documentElement.classList.contains('js')")
            assert has_run == (kind != "report of its own"), kind
            assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth)"), kind
            assert browser.messages == [], kind
            asked = {url.partition(":")[0] for url in browser.requests}
            assert "file" in asked, kind
            assert asked <= {"file", "data"}, (kind, asked)
    finally:
        browser.close()


def test_search_works_from_the_disk(site: Path) -> None:
    """Browsers load no JSON from file:// addresses, so the index is a script."""
    index = (site / "search" / "search_index.js").read_text()
    assert "over-refusal" in index
    assert 'src="iframe-worker.js"' in (site / "index.html").read_text()  # nor do they start workers
    assert 'src="../../iframe-worker.js"' in (site / "results/comparison/report.html").read_text()


def test_pages_lead_to_the_next_and_links_are_titles(site: Path) -> None:
    page = (site / "training.html").read_text()
    assert "md-footer__link--prev" in page
    assert "md-footer__link--next" in page
    assert ">Evaluation" in (site / "index.html").read_text()
    for path in site.rglob("*.html"):
        assert not re.search(r"<a [^>]*>[\w./-]+\.md</a>", path.read_text()), path


def test_the_reference_is_of_docstrings(site: Path) -> None:
    page = (site / "api" / "subspace.html").read_text()
    assert 'id="sails_align.subspace.basis.build_subspace"' in page
    assert "decoder directions of the chosen features" in page


@pytest.mark.parametrize(
    ("wrong", "summary"),
    [
        (
            {
                ("faq.md", "[here](missing.md)"): "missing.md",
                ("faq.md", "[here](method.md#no-such-part)"): "no-such-part",
                ("faq.md", "[here](../recipes/missing.yaml)"): "missing.yaml",
                ("forgotten.md", "# A page that is in no menu"): "forgotten.md",
            },
            "Aborted with 4 warnings",
        ),
        ({("api/data.md", "::: sails_align.nowhere"): "nowhere"}, "could not be found"),
    ],
)
def test_what_is_wrong_is_an_error(tmp_path: Path, wrong: dict[tuple[str, str], str], summary: str) -> None:
    folder = copy(tmp_path)
    for name, text in wrong:
        with (folder / "docs" / name).open("a") as page:
            page.write(f"\n{text}\n")
    done = build(folder)
    assert done.returncode != 0
    for said in (*wrong.values(), summary):
        assert said in done.stdout + done.stderr
