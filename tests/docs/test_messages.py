"""docs/messages.md has every message of the package, and each says what to do."""

import ast
import importlib.util
from types import ModuleType

import pytest
from paths import ROOT


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """docs/messages.py, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("messages", ROOT / "docs" / "messages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(made: ModuleType) -> None:
    assert made.PAGE.read_text() == made.page(), "run: python docs/messages.py --write"


def test_every_message_is_read(made: ModuleType) -> None:
    sources = {path: path.read_text() for path in (ROOT / "sails_align").rglob("*.py")}
    raised = sum(text.count("raise InputError(") + text.count("return InputError(") for text in sources.values())
    assert len(made.messages()) >= raised > 300


def test_every_message_has_a_remedy(made: ModuleType) -> None:
    without = [f"{of.module}:{of.line} {of.text!r}" for of in made.messages() if not (of.remedy or of.is_passed_on)]
    assert not without, "\n".join(without)


def test_a_message_without_a_remedy_is_found(made: ModuleType) -> None:
    source = 'def f(x): raise InputError(f"{self.x} is {x!r}, and that is bad")\nraise InputError("y is 1; choose 2")'
    found = {of[0]: made.Message("a", *of) for of in made._of(ast.parse(source))}
    bad, good = found[1], found[2]
    assert bad.text == "<x> is <x>, and that is bad"
    assert not bad.remedy
    assert not bad.is_passed_on
    assert (good.cause, good.remedy) == ("y is 1", "choose 2")
