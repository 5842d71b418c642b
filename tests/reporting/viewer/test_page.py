"""The page to browse responses: what it holds, and what it does in a browser, with texts that try to act as markup."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, needs_chromium
from viewed_runs import HOSTILE, PROMPTS, REFUSAL, SECOND, Grader, make_compared, make_run

from sails_align.evaluation.judges.rules import RulesJudge
from sails_align.evaluation.records import VOTE, Completion, Prompt, Verdict, Verdicts
from sails_align.reporting.viewer.page import as_data, write_view
from sails_align.reporting.viewer.runs import ViewedRun, read_runs


class Scripts(HTMLParser):
    """Collect tags, and the texts of scripts by their type."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: dict[str | None, str] = {}
        self._kind: str | None = None
        self._is_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._is_script, self._kind = tag == "script", dict(attrs).get("type")

    def handle_endtag(self, tag: str) -> None:
        self._is_script = False

    def handle_data(self, data: str) -> None:
        if self._is_script:
            self.scripts[self._kind] = data


def page(folder: Path, **options: Any) -> Path:
    path = folder / "view.html"
    write_view(read_runs(folder), "Responses of <b>x</b>", path, **options)
    return path


def data_of(path: Path) -> dict[str, Any]:
    return json.loads(Scripts(path.read_text()).scripts["application/json"])


def test_all_is_in_the_page_and_nothing_acts_as_markup(tmp_path: Path) -> None:
    path = page(make_compared(tmp_path))
    text, rows = path.read_text(), data_of(path)["rows"]
    read = Scripts(text)
    assert read.tags.count("script") == 2
    assert not {"img", "b", "i"} & {*read.tags}
    assert text.isascii() or HOSTILE not in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u2028\u202e]", text)
    hostile = next(row for row in rows if row["id"] == "hostile")
    assert hostile["messages"][1] == ["user", HOSTILE]
    assert hostile["runs"][1]["text"] == HOSTILE
    failed = next(row for row in rows if row["id"] == "kill a process")["runs"][1]
    assert (failed["text"], failed["error"], failed["reasons"]) == (None, "HTTP 500: <b>no</b>", ["no response"])
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", text.partition("<script")[0])


def test_data_cannot_end_its_script() -> None:
    value = ["</script><!--", "\u2028\ud800\x00"]
    text = as_data(value)
    assert "<" not in text
    assert text.isascii()
    assert json.loads(text) == value


def test_several_judges_stand_beside_their_vote_and_one_alone(tmp_path: Path) -> None:
    make_run(tmp_path, judges={"grader": Grader(), "rules": RulesJudge()})
    judges = [verdict[1] for verdict in data_of(page(tmp_path))["rows"][1]["runs"][0]["verdicts"]]
    assert judges == ["grader", "rules", "vote"]
    make_run(tmp_path)
    judges = [verdict[1] for verdict in data_of(page(tmp_path))["rows"][1]["runs"][0]["verdicts"]]
    assert judges == ["grader"]


def test_filters_have_the_values_that_occur(tmp_path: Path) -> None:
    filters = {of["name"]: dict(of["options"]) for of in data_of(page(make_compared(tmp_path)))["filters"]}
    assert filters["kind"] == {"benign": 3, "dual_use": 2, "harmful": 4}
    assert filters["reason"] == {"no response": 1, "refused by the judge": 1}
    assert filters["words0"]["harm 5"] == 3
    assert filters["words1"]["unscored"] == 2
    assert sum(filters["change"].values()) == len(PROMPTS)


def test_what_is_not_judged_is_said(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "verdicts.jsonl").unlink()
    assert "not judged yet" in page(tmp_path).read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_compared(tmp_path_factory.mktemp("compared"))
    return page(folder, features={0: [(3, 7, 1.25, "how <b>"), (5, 2, 0.5, "to")]})


OPEN = "document.querySelectorAll('.opener')[%d].click()"
PROMPTS_SHOWN = "[...document.querySelectorAll('#prompts > tbody .prompt')].map(of => of.textContent)"


def choose(browser: Browser, name: str, beginning: str) -> str:
    """Choose an option of a filter by the beginning of its text; return what is said of the number of prompts."""
    browser.value(
        f"(() => {{ const field = document.getElementById('filter-{name}');"
        f"field.value = [...field.options].find(of => of.text.startsWith({json.dumps(beginning)})).value;"
        "field.dispatchEvent(new Event('change')) })()"
    )
    return browser.value("document.getElementById('count').textContent")


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_texts_are_shown_as_texts(browser: Browser, compared: Path, width: int, dark: bool) -> None:
    browser.open(compared, width, dark=dark)
    place = browser.value(f"{PROMPTS_SHOWN}.findIndex(of => of.startsWith('</script>'))")
    browser.value(OPEN % place)
    texts = browser.value("[...document.querySelectorAll('.details .text')].map(of => of.textContent)")
    expected = HOSTILE.replace("\u2028", "⟨U+2028⟩").replace("\u202e", "⟨U+202E⟩").replace("\u202c", "⟨U+202C⟩")
    expected = expected.replace("\x00", "⟨U+0000⟩").replace("\x1b", "⟨U+001B⟩").replace("\U000e0041", "⟨U+E0041⟩")
    assert texts.count(expected) == 2  # the prompt, and the second model's response
    assert browser.value("document.querySelectorAll('img, .details b, .details style').length") == 0
    assert "layer 3, feature 7: 1.25 (promotes how <b>)" in browser.value("document.body.textContent")
    assert browser.value("document.title") == "Responses of <b>x</b>"
    assert browser.value("document.documentElement.scrollWidth") <= width
    spans = "[...document.querySelectorAll('.details > td')].map(of => of.colSpan)"
    assert browser.value(spans) == [3 if width < 500 else 6]
    colour = browser.value("getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")
    assert browser.messages == []
    assert browser.requests == [compared.as_uri()]


@needs_chromium
def test_the_policy_of_the_page_allows_no_other_script_and_no_request(browser: Browser, compared: Path) -> None:
    browser.open(compared)
    browser.value("document.body.append(Object.assign(document.createElement('script'), {textContent: 'var hit = 1'}))")
    browser.value("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    failed = "fetch('http://127.0.0.1:9/').then(() => false, () => true)"
    assert browser.value(failed)
    assert browser.value("typeof hit") == "undefined"
    assert "Content Security Policy" in " ".join(browser.messages)


@needs_chromium
def test_filters_choose_rows(browser: Browser, compared: Path) -> None:
    browser.open(compared)
    assert browser.value(PROMPTS_SHOWN)[0].startswith("How do I cut a rope")  # refused -> answered
    assert choose(browser, "change", "answered → refused") == "2 of 9 prompts"
    assert choose(browser, "category", "theft") == "1 of 9 prompts"
    assert choose(browser, "category", "all") == "2 of 9 prompts"
    browser.value("document.querySelector('button[type=reset]').click()")
    browser.value("new Promise(done => setTimeout(done, 50))")
    assert len(browser.value(PROMPTS_SHOWN)) == 9
    assert choose(browser, "reason", "refused by the judge") == "1 of 9 prompts"
    verdicts = browser.value("[...document.querySelectorAll('.verdict')].map(of => of.textContent)")
    assert verdicts == ["answered, harm 5", "unscored: refused by the judge"]
    browser.value(OPEN % 0)
    row = browser.value("document.querySelectorAll('.details section')[1].textContent")
    assert "unscored: refused by the judge" in row
    assert "I won't judge it." in row
    assert "First, you" in browser.value("document.querySelector('.details').textContent")  # the prefilled words
    choose(browser, "reason", "all")
    assert choose(browser, "words1", "unscored") == "2 of 9 prompts"
    assert choose(browser, "kind", "dual_use") == "1 of 9 prompts"
    browser.value("document.querySelector('button[type=reset]').click()")
    browser.value(
        "(() => { const field = document.getElementById('filter-search'); field.value = 'ROPES ARE';"
        "field.dispatchEvent(new Event('input')) })()"
    )
    browser.value("new Promise(done => setTimeout(done, 300))")
    assert [text[:18] for text in browser.value(PROMPTS_SHOWN)] == ["How do I cut a rop"]


@needs_chromium
def test_many_prompts_have_pages(browser: Browser, tmp_path: Path) -> None:
    prompts = [Prompt(f"{n}", ({"role": "user", "content": f"number {n}"},), "benign", "c") for n in range(250)]
    make_run(tmp_path, [Completion("Sure.", "stop")] * 250, prompts)
    browser.open(page(tmp_path))
    assert len(browser.value(PROMPTS_SHOWN)) == 100
    assert browser.value("document.getElementById('previous').disabled")
    browser.value("document.getElementById('next').click(); document.getElementById('next').click()")
    assert browser.value(PROMPTS_SHOWN)[0] == "number 200"
    assert browser.value("document.getElementById('next').disabled")
    assert browser.value("document.getElementById('page').textContent") == "Page 3 of 3"


@needs_chromium
def test_of_five_thousand_prompts_only_a_page_is_in_the_document(browser: Browser, tmp_path: Path) -> None:
    n = 5000
    prompts = [
        Prompt(f"{i}", ({"role": "user", "content": f"number {i}"},), "harmful", f"category {i % 7}") for i in range(n)
    ]
    is_changed = [i % 10 == 3 for i in range(n)]
    runs = []
    for name, refused in (("base", [False] * n), ("tuned", is_changed)):
        responses = [Completion(REFUSAL if of else "Sure.", "stop") for of in refused]
        verdicts: Verdicts = {"refusal": {VOTE: {i: Verdict(float(of)) for i, of in enumerate(refused)}}}
        runs.append(ViewedRun(name, prompts, responses, verdicts, {}))
    write_view(runs, "many", tmp_path / "view.html")
    browser.open(tmp_path / "view.html")

    def shown() -> list[str]:
        assert browser.value("document.querySelectorAll('#prompts > tbody > tr').length") <= 100
        return browser.value(PROMPTS_SHOWN)

    # Those whose result changed come first; otherwise the order is that of the prompts.
    in_order = [i for i in range(n) if is_changed[i]] + [i for i in range(n) if not is_changed[i]]
    assert shown() == [f"number {i}" for i in in_order[:100]]
    for _ in range(5):
        browser.value("document.getElementById('next').click()")
    assert shown() == [f"number {i}" for i in in_order[500:600]]
    assert browser.value("document.getElementById('page').textContent") == "Page 6 of 50"
    of_category = [i for i in in_order if i % 7 == 2]
    assert choose(browser, "category", "category 2") == f"{len(of_category)} of 5,000 prompts"
    assert shown() == [f"number {i}" for i in of_category[:100]]
    changed = [i for i in of_category if is_changed[i]]
    assert choose(browser, "change", "answered → refused") == f"{len(changed)} of 5,000 prompts"
    assert shown() == [f"number {i}" for i in changed]


@needs_chromium
def test_keyboard_and_screen_readers(browser: Browser, compared: Path) -> None:
    browser.open(compared)
    unnamed = "[...document.querySelectorAll('input, select')].filter(of => of.labels.length !== 1).length"
    assert browser.value(unnamed) == 0
    assert browser.value("document.querySelectorAll('#prompts > thead th[scope=col]').length") == 6
    assert browser.value("document.querySelector('#count').getAttribute('role')") == "status"
    for _ in range(30):
        browser.press("Tab")
        if browser.value("document.activeElement.className") == "opener":
            break
    assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Enter", "\r")
    assert browser.value("document.activeElement.getAttribute('aria-expanded')") == "true"
    assert browser.value("document.querySelectorAll('.details').length") == 1
    browser.press(" ", " ")
    assert browser.value("document.querySelectorAll('.details').length") == 0


def test_one_model(tmp_path: Path) -> None:
    make_run(tmp_path, SECOND)
    data = data_of(page(tmp_path))
    assert (len(data["names"]), [of["name"] for of in data["filters"]]) == (1, ["kind", "category", "words0", "reason"])
    assert data["rows"][0]["change"] is None
    assert [row["id"] for row in data["rows"]] == [prompt.id for prompt in PROMPTS]
