"""Documents are whole: no placeholders, and links lead somewhere."""

import re

import pytest
from paths import ROOT

DOCUMENTS = [path for pages in (".", "docs", "docs/methods") for path in sorted((ROOT / pages).glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_placeholder_is_left_and_links_exist(document):
    text = document.read_text(encoding="utf-8")
    assert not re.search(r"\b[A-Z]+_TABLE\b|\bTODO\b", text)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
