"""Tensors in temporary files are values as others, and leave no files behind."""

import resource
import tempfile
from pathlib import Path

import pytest
import torch

from sails_align.core.errors import InputError
from sails_align.edits.temporary import in_file, zeros_in_file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_are_copied(dtype: torch.dtype) -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    copy = in_file(values)
    assert copy.dtype == dtype
    assert torch.equal(copy, values)
    copy += 1
    assert not torch.equal(copy, values)


def test_files_are_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    zeros = zeros_in_file(torch.Size([4, 2]), torch.float32)
    assert not zeros.any()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_an_error_at_once() -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # of a file, which stands for the rest of a disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        assert not zeros_in_file(torch.Size([1000]), torch.float32).any()
        with pytest.raises(InputError, match=r"a temporary file of 4,000,000 bytes in .*;\n.* TMPDIR"):
            zeros_in_file(torch.Size([1_000_000]), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert zeros_in_file(torch.Size([0]), torch.float32).shape == (0,)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the kind of memory is known on Linux only")
def test_they_take_no_memory_that_the_system_cannot_have_back() -> None:
    def anonymous() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) * 1024

    size = 64 * 2**20
    before = anonymous()
    values = zeros_in_file(torch.Size([size // 4]), torch.float32)
    values += 1
    assert anonymous() - before < size / 4
    del values
