"""docs/supported.md has what `sails list --markdown` prints."""

import importlib.metadata

import pytest
from families import TEXT_CONFIGS
from paths import ROOT

from sails_align.cli.choices import KINDS, as_markdown
from sails_align.models import FAMILIES


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_what_the_command_prints(kind: str) -> None:
    tested = f"sae-lens=={importlib.metadata.version('sae-lens')}"
    if kind == "saes" and tested not in (ROOT / "constraints.txt").read_text():
        pytest.skip(f"the page lists the SAEs of another version of sae-lens than {tested}")
    page = (ROOT / "docs" / "supported.md").read_text(encoding="utf-8")
    assert as_markdown({kind: KINDS[kind]}) in page


def test_the_page_has_no_other_kind() -> None:
    page = (ROOT / "docs" / "supported.md").read_text(encoding="utf-8")
    assert page.count("\n## ") == len(KINDS)


def test_the_families_are_those_that_tests_cover() -> None:
    assert FAMILIES.keys() == TEXT_CONFIGS.keys()
