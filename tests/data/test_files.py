"""Local files: a path is a path, what is read is what is there now, and a bad row does not take its file with it."""

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from datasets import Dataset
from packaging.version import Version

from sails_align.core.errors import InputError
from sails_align.data.files import MAX_DEPTH
from sails_align.data.loading import NoSplitError, load_rows
from sails_align.data.pairs import normalize

GOOD = {"prompt": "a", "completion": "b"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


def write(path: Path, rows: list[dict]) -> None:
    """Write a file of any kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.with_name(path.name.removesuffix(".gz"))
    if plain.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(plain)
    elif plain.suffix == ".csv":
        Dataset.from_list(rows).to_csv(plain)
    else:
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        plain.unlink()


# Paths


@pytest.mark.parametrize("name", ["pairs[1].jsonl", "pairs*.jsonl", "pair?1.csv", "{a,b}.parquet", "p[1].parquet.gz"])
def test_a_path_is_no_pattern(tmp_path: Path, name: str):
    for other in ("pairs1.jsonl", "pair11.csv", "a.parquet", "b.parquet", "p1.parquet.gz"):
        write(tmp_path / other, [{"a": "wrong"}])
    write(tmp_path / name, [{"a": "right"}])
    assert load_rows(str(tmp_path / name)).to_list() == [{"a": "right"}]


def test_a_folder_is_no_pattern(tmp_path: Path):
    write(tmp_path / "d1" / "train.jsonl", [{"a": "wrong"}])
    write(tmp_path / "d[1]" / "train.jsonl", [{"a": "right"}])
    write(tmp_path / "d[1]" / "test.jsonl", [{"a": "test"}])
    assert load_rows(str(tmp_path / "d[1]")).to_list() == [{"a": "right"}]
    assert load_rows(str(tmp_path / "d[1]"), split="test").to_list() == [{"a": "test"}]
    Dataset.from_list([{"a": "saved"}]).save_to_disk(tmp_path / "s[1]")
    Dataset.from_list([{"a": "wrong"}]).save_to_disk(tmp_path / "s1")
    assert load_rows(str(tmp_path / "s[1]")).to_list() == [{"a": "saved"}]
    (tmp_path / "d[1]" / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: test.jsonl\n---\n")
    for config in (None, "x"):
        assert load_rows(str(tmp_path / "d[1]"), config=config).to_list() == [{"a": "test"}]


def test_the_glob_case(shared: Path):
    path = shared / "cases/glob_path/pairs[1].jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    assert "WRONG FILE" not in str(load_rows(str(path)).to_list())


# What is there now


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "a.parquet.gz", "d/train.jsonl", "saved"]
)
def test_a_file_is_read_again_when_it_changed(tmp_path: Path, name: str):
    path = tmp_path / name
    for text in ("one", "two"):
        if name == "saved":
            shutil.rmtree(path, ignore_errors=True)
            Dataset.from_list([{"a": text}]).save_to_disk(path)
        else:
            write(path, [{"a": text}])
        for file in path.rglob("*") if path.is_dir() else [path]:
            os.utime(file, (1, 1))
        given = path.parent if name.startswith("d/") else path
        assert load_rows(str(given)).to_list() == [{"a": text}]


# Texts


def test_csv_values_are_texts(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,n\n007,42,\nTrue,None,1.0\n1e5,N/A,nan\n")
    rows = load_rows(str(path)).to_list()
    assert [tuple(row.values()) for row in rows] == [("007", "42", ""), ("True", "None", "1.0"), ("1e5", "N/A", "nan")]
    assert normalize(load_rows(str(path))).dataset["chosen"][:] == ["42", "None", "N/A"]
    (tmp_path / "d").mkdir()
    shutil.copy(path, tmp_path / "d" / "train.csv")
    assert load_rows(str(tmp_path / "d")).to_list() == rows


def test_csv_truth_values(tmp_path: Path):
    (tmp_path / "a.csv").write_text("prompt,completion,harmful\na,b,True\na,b,false\na,b,\n")
    assert normalize(load_rows(str(tmp_path / "a.csv"))).dataset["harmful"][:] == [True, False, None]


def test_tsv(tmp_path: Path):
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\na, b\t007\n")
    assert load_rows(str(tmp_path / "a.tsv")).to_list() == [{"prompt": "a, b", "completion": "007"}]


@pytest.mark.parametrize("name", ["A.JSONL", "a.Json", "A.CSV", "a.PARQUET", "A.JSONL.GZ"])
def test_endings_in_capitals(tmp_path: Path, name: str):
    small = tmp_path / name.lower()
    write(small, [GOOD])
    small.rename(tmp_path / name)
    assert load_rows(str(tmp_path / name)).to_list() == [GOOD]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_bom(tmp_path: Path, name: str):
    if name == "a.json" and Version(version("datasets")) < Version("5.1"):
        pytest.skip("datasets before 5.1 do not read a JSON list after a BOM")
    text = {"a.jsonl": '{"a": "x"}\n', "a.json": '[{"a": "x"}]', "a.csv": "a\nx\n", "a.tsv": "a\nx\n"}[name]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_rows(str(tmp_path / name)).to_list() == [{"a": "x"}]


# Bad rows

DEEP = b'{"prompt": "a", "completion": ' + b"[" * 2000 + b"]" * 2000 + b"}"
BAD = {
    "the row is not UTF-8": b'{"prompt": "a", "completion": "caf\xe9"}',
    "the row has a lone surrogate": b'{"prompt": "a", "completion": "x\\ud83d"}',
    "the row is nested too deeply": DEEP,
    "the row is not JSON": b'{"prompt": "a", "compl',
    "the row is not a JSON object": b"[1, 2]",
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "d/train.jsonl"])
@pytest.mark.parametrize("cause", BAD)
def test_a_bad_row_is_counted(tmp_path: Path, cause: str, name: str):
    good = json.dumps(GOOD).encode()
    content = b"\n".join([good, b"", BAD[cause], good, b""])
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    given = str(path.parent if name.startswith("d/") else path)
    with pytest.raises(InputError) as error:
        load_rows(given)
    assert f"1 of 3 rows of {given} cannot be read: {cause}" in str(error.value)
    rows = load_rows(given, mark_unreadable=True)
    with pytest.raises(InputError) as error:
        normalize(rows, name="mine")
    assert f"{cause}" in str(error.value)
    assert "(row 1)" in str(error.value)
    found = normalize(rows, on_bad_rows="skip")
    assert found.dataset["chosen"][:] == ["b", "b"]
    assert list(found.dropped.values()) == [1]


ROWS = "".join(json.dumps(GOOD) + "\n" for _ in range(50)).encode()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.jsonl.gz", gzip.compress(ROWS, mtime=0)[:-12], "cut.jsonl.gz (split train) cannot be loaded: Compressed"),
        ("garbage.jsonl.gz", b"\x1f\x8b\x08garbage", "garbage.jsonl.gz (split train) cannot be loaded: Compressed"),
        ("bits.csv.gz", gzip.compress(ROWS, mtime=0)[:10] + b"\xff" * 40, "cannot be loaded: Error -3"),
        ("a.jsonl", ROWS.decode().encode("utf-16"), "a.jsonl is UTF-16; save it as UTF-8"),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), "a.csv is UTF-16; save it as UTF-8"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, said: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        load_rows(str(tmp_path / name), mark_unreadable=True)
    assert said in str(error.value)


def test_what_is_no_file(tmp_path: Path):
    (tmp_path / "gone.jsonl").symlink_to("nowhere.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, said in (("gone", "a link to nowhere.jsonl"), ("loop", "a link to loop"), ("pipe", "neither a file")):
        with pytest.raises(InputError, match=f"{name}.jsonl is {said}"):
            load_rows(str(tmp_path / f"{name}.jsonl"))
    with pytest.raises(InputError) as error:
        load_rows(str(tmp_path / "gone.json"))
    assert "gone.jsonl" not in str(error.value)


def test_a_parquet_file_of_no_rows(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], "string")}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet \(split train\) is empty"):
        load_rows(str(tmp_path / "a.parquet"))


def test_a_split_does_not_depend_on_the_others(tmp_path: Path):
    write(tmp_path / "train.jsonl", [GOOD])
    write(tmp_path / "test.jsonl", [{"question": "a", "answer": [1]}])
    assert load_rows(str(tmp_path)).to_list() == [GOOD]
    assert load_rows(str(tmp_path), split="test[:1]").to_list() == [{"question": "a", "answer": [1]}]
    with pytest.raises(NoSplitError, match='Unknown split "dev"'):
        load_rows(str(tmp_path / "train.jsonl"), split="dev")
    (tmp_path / "test.jsonl").write_text("not json\n" * 3)
    assert load_rows(str(tmp_path)).to_list() == [GOOD]
    with pytest.raises(InputError, match=r"3 of 3 rows of .* \(split test\) cannot be read: the row is not JSON"):
        load_rows(str(tmp_path), split="test", mark_unreadable=True)


def test_bad_rows_of_other_kinds(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\na,"x\ny"\nb,caf\xe9\nc,007\n')
    (tmp_path / "a.json").write_bytes(b'[{"prompt": "a", "completion": "b"},\n{"prompt": "c", "completion": "x\xe9"}]')
    for name, chosen in (("a.csv", ["x\ny", "007"]), ("a.json", ["b"])):
        found = normalize(load_rows(str(tmp_path / name), mark_unreadable=True), on_bad_rows="skip")
        assert found.dataset["chosen"][:] == chosen
        assert found.dropped == {"the row is not UTF-8": 1}
        with pytest.raises(InputError, match="not UTF-8"):
            load_rows(str(tmp_path / name))


def test_texts_that_only_look_bad_stay(tmp_path: Path):
    texts = ["\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "\\ud83d", "[" * 200, "\x00"]
    rows = [{"prompt": "a", "completion": text} for text in texts]
    turns = [{"role": "user" if n % 2 == 0 else "assistant", "content": "x"} for n in range(2 * MAX_DEPTH)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps([{"messages": turns}] * 3, indent=1))
    assert load_rows(str(tmp_path / "a.jsonl")).to_list() == rows
    assert load_rows(str(tmp_path / "b.json")).to_list() == [{"messages": turns}] * 3


def test_the_cp1252_case(shared: Path):
    path = shared / "cases/cp1252_jsonl/pairs.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    found = normalize(load_rows(str(path), mark_unreadable=True), on_bad_rows="skip")
    assert found.dropped.keys() == {"the row is not UTF-8"}
    assert len(found.dataset) == len(path.read_bytes().splitlines()) - found.dropped["the row is not UTF-8"]
