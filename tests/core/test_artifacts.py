"""An artifact is written as a whole or not at all, and is not read if it is not what was written."""

import errno
import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from sails_align.core import artifacts
from sails_align.core.artifacts import (
    content_hash,
    load_artifact,
    package_versions,
    read_header,
    save_artifact,
    tensors_hash,
)
from sails_align.core.errors import InputError, exit_on_input_error
from sails_align.core.files import atomic_folder, disk_errors, write_json, write_text

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tensors = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.tensor([1, 2])}
    save_artifact(tmp_path / "a", "stats", tensors, {"who": "me"}, "abc")
    return tmp_path / "a"


def test_round_trip(saved):
    tensors, header = load_artifact(saved, "stats")
    assert torch.equal(tensors["x"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(tensors["y"], torch.tensor([1, 2]))
    assert header["provenance"] == {"who": "me"}
    assert header["input_hash"] == "abc"
    assert sorted(path.name for path in saved.iterdir()) == ["stats.json", "stats.safetensors"]


def test_tensors_that_share_storage_or_are_views_are_saved(tmp_path):
    x = torch.randn(4, 6)
    save_artifact(tmp_path / "a", "k", {"x": x, "same": x, "view": x.T[1:3]}, {}, "")
    tensors, _ = load_artifact(tmp_path / "a", "k")
    assert torch.equal(tensors["same"], x)
    assert torch.equal(tensors["view"], x.T[1:3])


def test_saving_again_replaces_and_leaves_nothing_behind(saved):
    save_artifact(saved, "stats", {"z": torch.ones(1)}, {}, "def")
    tensors, header = load_artifact(saved, "stats")
    assert list(tensors) == ["z"]
    assert header["input_hash"] == "def"
    assert [path.name for path in saved.parent.iterdir()] == ["a"]


def test_a_failed_save_keeps_the_old_artifact_and_leaves_nothing_behind(saved):
    with pytest.raises(ValueError, match="JSON"):
        save_artifact(saved, "stats", {"z": torch.ones(1)}, {"bad": float("nan")}, "def")
    assert load_artifact(saved, "stats")[1]["input_hash"] == "abc"
    assert [path.name for path in saved.parent.iterdir()] == ["a"]


def test_a_missing_artifact_has_no_header_and_cannot_be_loaded(tmp_path):
    assert read_header(tmp_path, "stats") is None
    with pytest.raises(InputError, match=r"stats\.json is missing"):
        load_artifact(tmp_path, "stats")


def test_one_changed_byte_is_noticed(saved):
    path = saved / "stats.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="corrupted"):
        load_artifact(saved, "stats")


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"kind": "stats", "format": 99}', '{"kind": "other", "format": 1}']
)
def test_a_damaged_or_foreign_header_is_refused(saved, text):
    (saved / "stats.json").write_text(text)
    with pytest.raises(InputError, match=r"damaged|is not a stats artifact"):
        read_header(saved, "stats")


def test_a_header_without_its_hash_is_refused(saved):
    header = json.loads((saved / "stats.json").read_text())
    del header["sha256"]
    (saved / "stats.json").write_text(json.dumps(header))
    with pytest.raises(InputError):
        load_artifact(saved, "stats")


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), json_values))
def test_content_hash_ignores_the_order_of_keys(value):
    assert content_hash(dict(reversed(value.items()))) == content_hash(value)
    assert content_hash({**value, "one more key": 1}) != content_hash(value)


def test_tensors_hash_tells_names_shapes_dtypes_and_values_apart():
    x = torch.arange(6.0)
    different = [{"x": x}, {"y": x}, {"x": x.reshape(2, 3)}, {"x": x.double()}, {"x": x + 1}, {"x": x, "y": x}]
    assert len({tensors_hash(tensors) for tensors in different}) == len(different)
    assert tensors_hash({"x": x, "y": 2 * x}) == tensors_hash({"y": 2 * x, "x": x.clone()})


def test_package_versions_name_what_is_missing(monkeypatch):
    monkeypatch.setattr(artifacts, "PACKAGES", ["torch", "no-such-package"])
    assert package_versions() == {"torch": version("torch"), "no-such-package": None}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENOTDIR])
def test_disk_errors_name_the_path_and_a_remedy(number):
    with pytest.raises(InputError, match=r"cannot write /there/it: .*--output_dir"), disk_errors(Path("/there/it")):
        raise OSError(number, "no")


def test_other_errors_pass_through():
    with pytest.raises(FileNotFoundError), disk_errors(Path("x")):
        raise FileNotFoundError(errno.ENOENT, "no")


def test_a_disk_that_fills_up_while_writing_tensors_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(InputError, match="No space left"):
        save_artifact(tmp_path / "a", "k", {"x": torch.ones(1)}, {}, "")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_own_error_for_a_full_disk_is_understood():
    with pytest.raises(InputError, match="cannot write"), disk_errors(Path("x")):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), disk_errors(Path("x")):  # control
        raise SafetensorError("Error while deserializing: invalid UTF-8 in header")


def test_a_file_in_the_way_is_reported(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"), atomic_folder(tmp_path / "file" / "a"):
        pass


def test_a_file_in_the_place_of_the_folder_is_kept(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(InputError, match="cannot write"):
        save_artifact(tmp_path / "a", "k", {"x": torch.ones(1)}, {}, "")
    assert (tmp_path / "a").read_text() == "mine"


def test_a_folder_that_holds_anything_else_is_kept(saved):
    (saved / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"it holds 'thesis.tex'"):
        save_artifact(saved, "stats", {"z": torch.ones(1)}, {}, "def")
    assert load_artifact(saved, "stats")[1]["input_hash"] == "abc"
    with pytest.raises(InputError, match="give a folder of its own"):
        save_artifact(saved, "other", {"z": torch.ones(1)}, {}, "def")


def test_write_text_and_json(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"a": [1, None]})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "new" / "a.json", float("inf"))
    write_text(tmp_path / "new" / "a.json", "ü")
    assert (tmp_path / "new" / "a.json").read_text(encoding="utf-8") == "ü"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_a_command_ends_on_an_input_error_with_its_message_and_code_2(capsys):
    with pytest.raises(SystemExit) as exit_info, exit_on_input_error():
        raise InputError("tau is 7")
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: tau is 7\n"
