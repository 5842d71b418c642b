"""Make the README the home page of the site, link to copies of other files of the repository, and show titles in links.

The documents link to `../README.md` or `../recipes/...`, for readers of the repository. On the site, the README is the
home page, notebooks are pages, and other files of the repository are copied to `files/`.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import nbconvert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
HOME = "index.md"
NAMED = re.compile(r"\[[\w./-]+\.md\](?=\((?P<path>[^)#:\s]+\.md)(#[^)]*)?\))")
"""A link whose text is the name of a document: on the site, its text is the document's title."""
STYLE = re.compile(r"<style.*?</style>", re.DOTALL)
"""Of pandas' tables, which Markdown would take for text."""
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the home page, and the files of the repository that documents link to."""
    files.append(File.generated(config, HOME, content=(ROOT / "README.md").read_text(encoding="utf-8")))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        text, _ = nbconvert.MarkdownExporter().from_filename(str(ROOT / "docs" / notebook.src_uri))
        files.append(File.generated(config, _page_of(notebook.src_uri), content=STYLE.sub("", text)))
    pages = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    linked = {of for uri, text in pages for link in LINK.finditer(text) if (of := _outside(uri, link["path"]))}
    for path in sorted(linked):
        files.append(File.generated(config, _copied(path), content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links of the repository into links of the site."""
    uri = page.file.src_uri

    def of_site(link: re.Match[str]) -> str:
        target = _target(uri, link["path"])
        if target == "README.md":
            target = f"docs/{HOME}"
        elif outside := _outside(uri, link["path"]):
            target = f"docs/{_copied(outside)}"
        here = posixpath.dirname(posixpath.join("docs", uri))
        return _page_of(posixpath.relpath(target, here)) if target.startswith("docs/") else link["path"]

    def titled(link: re.Match[str]) -> str:
        file = ROOT / _target(uri, link["path"])
        title = re.search(r"^# (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE) if file.is_file() else None
        return f"[{title[1]}]" if title else link[0]

    return LINK.sub(of_site, NAMED.sub(titled, markdown))


def _page_of(path: str) -> str:
    """Return the path of the page that is made of a notebook; other paths stay as they are."""
    return re.sub(r"\.ipynb$", ".md", path)


def _target(uri: str, link: str) -> str:
    """Return the path of a page's link target, relative to the repository."""
    source = "README.md" if uri == HOME else posixpath.join("docs", uri)
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _outside(uri: str, link: str) -> str | None:
    """Return the path of a file that is not in docs/ or that mkdocs skips; None for other links.

    A report's report.html is skipped, since the page of its report.md has that name on the site.
    """
    target = _target(uri, link)
    is_page_or_picture = target.startswith("docs/") and not target.endswith((".py", ".json", "/report.html"))
    return target if target != "README.md" and not is_page_or_picture and (ROOT / target).is_file() else None


def _copied(path: str) -> str:
    """Return the path of a copied file on the site. Files of types that browsers do not show become text files."""
    is_shown = path.endswith((".json", ".txt", ".html"))
    return f"files/{path}" if is_shown else f"files/{path}.txt"
