"""Trackers: real files of TensorBoard, wandb (offline) and trackio (local), read back."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from events import Events
from PIL import Image
from processes import PATIENCE
from tensorboard.plugin_util import markdown_to_safe_html

from sails_align.core.errors import InputError
from sails_align.core.trackers import MOST_ROWS, services_of, trackers_of

HOSTILE = [
    "<script>alert(1)</script> & <b>bold</b>",
    "a | b | c",
    "[click](javascript:alert(1)) ![x](http://evil.example/x.png) <http://evil.example>",
    "`code` *em* __strong__ # head ~~~ \\| &amp; &#42;",
    "two\nlines\n\n| --- |\n- item\n    indented",
]
ROWS = [{"prompt": text, "response": text, "score": number} for number, text in enumerate(HOSTILE)]


def png() -> bytes:
    pixels_HWC = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels_HWC).save(file, "png")
    return file.getvalue()


class Cells(HTMLParser):
    """The texts of a table's cells, and the names of all tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "td":
            self.cells.append("")
        elif tag == "br":
            self.cells[-1] += "\n"

    def handle_data(self, data: str) -> None:
        if self.cells and data.strip("\n"):
            self.cells[-1] += data


def test_tensorboard_shows_what_was_sent(tmp_path: Path) -> None:
    with trackers_of(["tensorboard"], "run", tmp_path) as trackers:
        trackers.numbers({"overall/safety_rate": 0.75, "overall/safety_rate_low": 0.5})
        trackers.table("responses", ROWS)
        trackers.picture("forest", png())
    events = Events(tmp_path)
    assert events.scalars() == {"overall/safety_rate": {0: 0.75}, "overall/safety_rate_low": {0: 0.5}}
    image = Image.open(BytesIO(events.images()["forest"]))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(BytesIO(png()))))


def test_tensorboard_shows_hostile_texts_as_texts(tmp_path: Path) -> None:
    with trackers_of(["tensorboard"], "run", tmp_path) as trackers:
        trackers.table("responses", ROWS)
    shown = Cells(markdown_to_safe_html(Events(tmp_path).texts()["responses"]))
    assert shown.tags == {"p", "table", "thead", "tbody", "tr", "th", "td", "br"}
    assert shown.cells == [str(cell) for row in ROWS for cell in row.values()]
    # The same texts as Markdown would not be shown as they are.
    assert {"a", "img"} & Cells(markdown_to_safe_html(HOSTILE[2])).tags


def test_control_characters_are_left_out(tmp_path: Path) -> None:
    with trackers_of(["tensorboard"], "run", tmp_path) as trackers:
        trackers.table("responses", [{"response": "a\x1b[2Jb\u202ec\ud800"}])
    assert Cells(markdown_to_safe_html(Events(tmp_path).texts()["responses"])).cells == ["abc\ufffd"]


@pytest.mark.parametrize("n", [1, MOST_ROWS, MOST_ROWS + 1, 1024])
def test_long_tables_are_thinned_evenly(tmp_path: Path, n: int) -> None:
    with trackers_of(["tensorboard"], "run", tmp_path) as trackers:
        trackers.table("responses", [{"number": number} for number in range(n)])
    text = Events(tmp_path).texts()["responses"]
    numbers = [int(cell) for cell in Cells(markdown_to_safe_html(text)).cells]
    assert text.startswith(f"{len(numbers)} of {n} rows")
    assert len(numbers) == n if n <= MOST_ROWS else MOST_ROWS / 2 <= len(numbers) <= MOST_ROWS
    assert len({after - before for before, after in pairwise(numbers)}) <= 1


def test_only_the_main_process_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with trackers_of(["tensorboard"], "run", tmp_path) as trackers:
        trackers.numbers({"x": 1.0})
    assert not list(tmp_path.iterdir())


def test_services() -> None:
    assert services_of(["none"]) == []
    assert services_of(["tensorboard", "none", "tensorboard"]) == ["tensorboard"]
    with pytest.raises(InputError, match="report_to is tensorbord, which is unknown or not installed;\npip install it"):
        services_of(["tensorbord"])


@pytest.fixture
def wandb() -> Iterator[Any]:
    """The module, which reads the environment once more here, and in the test after this one."""
    module = pytest.importorskip("wandb")
    module.teardown()
    yield module
    module.teardown()


def test_wandb_has_what_was_sent_and_no_secret(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "0123456789abcdef" * 2 + "01234567"
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": tmp_path,
        "WANDB_SILENT": "true",
        "WANDB_API_KEY": key,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["sails", "--judge_base_url", "http://user:s3cret@localhost/v1"])
    with trackers_of(["wandb"], "run", tmp_path / "unused") as trackers:
        trackers.numbers({"overall/safety_rate": 0.75})
        trackers.table("responses", ROWS)
        trackers.picture("forest", png())
    assert wandb.run is None
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = run.glob("run-*.wandb")
    end = time.monotonic() + PATIENCE  # a process of its own writes the file, at times after `finish` has returned
    while b"overall/safety_rate" not in log.read_bytes():
        assert time.monotonic() < end, "the number is not in wandb's file"
        time.sleep(0.2)
    (table,) = run.glob("files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [list(row.values()) for row in ROWS]
    (picture,) = run.glob("files/media/images/*.png")
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(Image.open(BytesIO(png()))))
    files = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in files if b"s3cret" in path.read_bytes() or key.encode() in path.read_bytes()]


def test_wandb_without_a_key_is_an_input_error(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with (
        pytest.raises(InputError, match=r"wandb takes no results: .*;\nset WANDB_API_KEY"),
        trackers_of(["wandb"], "run", tmp_path),
    ):
        pass


SENDS = """
from test_trackers import ROWS, png
from sails_align.core.trackers import trackers_of
for go_on in (False, True, False):
    with trackers_of(["trackio"], "run", None, go_on=go_on) as trackers:
        trackers.numbers({"overall/safety_rate": 0.75})
        trackers.table("responses", ROWS)
        trackers.picture("forest", png())
"""


def test_trackio_has_what_was_sent(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    paths = [*sys.path, str(Path(__file__).parent)]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", SENDS], env=environment, check=True, timeout=PATIENCE)
    with closing(sqlite3.connect(tmp_path / "huggingface.db")) as database:
        sent = database.execute("select run_id, metrics from metrics order by id").fetchall()
    assert len({run for run, _ in sent}) == 2  # the second went on with the first
    values = [(name, value) for _, text in sent for name, value in json.loads(text).items()]
    assert [value for name, value in values if name == "overall/safety_rate"] == 3 * [0.75]
    assert [value["_value"] for name, value in values if name == "responses"] == 3 * [ROWS]
    pictures = list((tmp_path / "media").rglob("*.png"))
    assert len(pictures) == 3
    assert np.array_equal(np.asarray(Image.open(pictures[0]).convert("RGB")), np.asarray(Image.open(BytesIO(png()))))
