"""Local folders whose card declares configurations: the same rows as their files, read directly."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from sails_align.core.errors import InputError
from sails_align.data.loading import load_rows
from sails_align.data.pairs import normalize
from sails_align.evaluation.prompts.load import load_prompts

TWO = """---
# the data
configs:
- config_name: easy
  default: true
  data_files:
  - {split: train, path: [a.csv, more/*.csv]}
  - {split: test, path: t.csv}
- config_name: hard
  data_dir: hard
  data_files: "*.jsonl"
dataset_info:
- config_name: easy
  splits:
  - {name: train, num_examples: 3}
---
# Title
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two configurations, of csv and of jsonl files."""
    folder = tmp_path / "made"
    for name in ("more", "hard"):
        (folder / name).mkdir(parents=True)
    (folder / "a.csv").write_text("prompt,completion\n007,True\n1e5,N/A\n")
    (folder / "more" / "b.csv").write_text("prompt,completion\nx,1.0\n")
    (folder / "t.csv").write_text("prompt,completion\nheld out,42\n")
    (folder / "not declared.csv").write_text("prompt,completion\nwrong,wrong\n")
    (folder / "hard" / "c.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "caf\xe9"}\n')
    (folder / "README.md").write_text(TWO)
    return folder


def test_a_declared_folder_has_the_rows_of_its_files(folder: Path):
    files = [load_rows(str(folder / name)).to_list() for name in ("a.csv", "more/b.csv", "t.csv")]
    assert files[0][0] == {"prompt": "007", "completion": "True"}
    assert load_rows(str(folder)).to_list() == files[0] + files[1]
    assert load_rows(str(folder), config="easy", split="test").to_list() == files[2]
    assert load_rows(str(folder), split="train+test").to_list() == files[0] + files[1] + files[2]
    with pytest.raises(InputError, match=r"1 of 2 rows .* cannot be read: the row is not UTF-8"):
        load_rows(str(folder), config="hard")
    found = normalize(load_rows(str(folder), config="hard", mark_unreadable=True), on_bad_rows="skip")
    assert found.dataset["chosen"][:] == ["b"]
    assert found.dropped == {"the row is not UTF-8": 1}


def test_files_may_change_their_splits(folder: Path):
    for name in ("a", "b", "c"):
        (folder / name).mkdir()
        (folder / name / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps({"a": name}).encode()))
    for test in ("[b/x.jsonl.gz, c/x.jsonl.gz]", "c/x.jsonl.gz"):
        train = "a/x.jsonl.gz" if "b" in test else "[a/x.jsonl.gz, b/x.jsonl.gz]"
        of_split = f"[{{split: train, path: {train}}}, {{split: test, path: {test}}}]"
        (folder / "README.md").write_text(f"---\nconfigs: [{{config_name: x, data_files: {of_split}}}]\n---\n")
        names = "".join(row["a"] for row in load_rows(str(folder), split="test").to_list())
        assert names == ("bc" if "b" in test else "c")


@pytest.mark.parametrize(
    ("configs", "said"),
    [
        ("[", "README.md declares `configs` in its header, which cannot be read: while parsing"),
        ("[{config_name: x", "README.md declares `configs` in its header, which cannot be read: while parsing"),
        ("[{data_files: a.csv}]", "Each config must include `config_name`"),
        ("7", "README.md declares `configs`"),
        ("[7]", "README.md declares `configs`"),
        ("[{config_name: x, data_files: 7}]", "Expected data_files in YAML"),
        ("[{config_name: x, data_files: gone.csv}]", "Unable to find"),
        ("[{config_name: x, data_files: README.md}]", "doesn't contain any data files that can be read"),
        ("[{config_name: x, data_files: a.csv, sep: ';'}]", "declares sep: ';' for its files"),
        ("[{config_name: x, data_files: 'https://example.org/a.csv'}]", "https://example.org/a.csv, which is not in"),
        ("[{config_name: x, data_files: [a.csv, hard/*]}]", "data files of 2 formats (a.csv, hard/c.jsonl)"),
        ("[{config_name: x, data_files: a.csv}, {config_name: y}]", "the configurations x, y; name one of them"),
    ],
)
def test_bad_cards(folder: Path, configs: str, said: str):
    (folder / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    with pytest.raises(InputError) as error:
        load_rows(str(folder))
    assert str(folder) in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize("card", ["no header, configs: [", "---\nlicense: [\n---\nconfigs:\n", "---\nconfigs:\n---\n"])
def test_a_card_that_declares_nothing(tmp_path: Path, card: str):
    (tmp_path / "a.csv").write_text("prompt,completion\n007,True\n")
    (tmp_path / "README.md").write_text(card)
    assert load_rows(str(tmp_path)).to_list() == [{"prompt": "007", "completion": "True"}]
    with pytest.raises(InputError, match="declares no configurations, and not 'x'"):
        load_rows(str(tmp_path), config="x")


def test_a_folder_with_files_of_two_formats(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    (tmp_path / "b.tsv").write_text("prompt\tcompletion\nx\tz\n")
    with pytest.raises(InputError, match=r"of 2 formats \(a.jsonl, b.tsv\)"):
        load_rows(str(tmp_path))
    (tmp_path / "a.jsonl").rename(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"of 2 formats \(a.csv, b.tsv\)"):
        load_rows(str(tmp_path))


def test_a_named_set_from_a_declared_folder(tmp_path: Path):
    for name, kind in (("harmful", "bad"), ("benign", "good")):
        rows = "".join(f"{n:03},{kind} {n:03},{n:03}\n" for n in range(100))
        (tmp_path / f"{name}.csv").write_text(f"Index,Goal,Category\n{rows}")
    files = "\n".join(f"  - {{split: {name}, path: {name}.csv}}" for name in ("harmful", "benign"))
    info = "dataset_info: {config_name: behaviors, splits: [{name: harmful}]}"
    for card in (f"---\nconfigs:\n- config_name: behaviors\n  data_files:\n{files}\n{info}\n---\n", "My copy\n"):
        (tmp_path / "README.md").write_text(card)
        for name, text in (("jailbreakbench", "bad 007"), ("jailbreakbench-benign", "good 007")):
            prompts = load_prompts(f"{name}={tmp_path}")
            assert len(prompts) == 100
            assert (prompts[7].messages[-1]["content"], prompts[7].category) == (text, "007")
