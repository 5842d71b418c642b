"""The largest directions of a change are those of its SVD."""

import pytest
import torch

from sails_align.edits import low_rank
from sails_align.edits.low_rank import output_directions, truncated
from sails_align.edits.weights import Update


def svd(delta: torch.Tensor, k: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    s[k:] = 0
    return u * s @ v


def test_it_is_the_truncated_svd() -> None:
    torch.manual_seed(0)
    for shape in ((5, 9), (9, 5), (6, 6)):
        delta_OI = torch.randn(*shape, dtype=torch.float64)
        for k in (1, 3):
            kept_OI, is_unique = truncated(delta_OI, k)
            torch.testing.assert_close(kept_OI, svd(delta_OI, k), atol=1e-10, rtol=0)
            assert is_unique
        for k in (0, 5, 9):
            assert truncated(delta_OI, k)[0] is delta_OI or k == 5
            torch.testing.assert_close(truncated(delta_OI, k)[0], delta_OI if k in (0, 9) else svd(delta_OI, 5))


def test_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    for shape in ((5, 9), (9, 5)):
        delta_OI = torch.randn(*shape, dtype=torch.float64)
        whole, before = truncated(delta_OI, 2)[0], delta_OI.clone()
        with monkeypatch.context() as patch:
            patch.setattr(low_rank, "PART", 10)  # two rows of five
            torch.testing.assert_close(truncated(delta_OI, 2)[0], whole, atol=1e-12, rtol=0)
        assert torch.equal(delta_OI, before)


def test_equal_singular_values_at_the_cut_are_noticed() -> None:
    delta = torch.diag(torch.tensor([3.0, 2.0, 2.0, 0.0]))
    assert [truncated(delta, k)[1] for k in (1, 2, 3)] == [True, False, True]
    update = Update(torch.eye(4)[:3], delta[:, :3], 1.0)
    assert [output_directions(update, k)[1] for k in (1, 2, 3)] == [True, False, True]


def test_directions_of_an_adapter_are_those_of_its_product() -> None:
    torch.manual_seed(0)
    update = Update(torch.randn(4, 9), torch.randn(7, 4), 0.5)
    directions_OK, is_unique = output_directions(update, 2)
    delta_OI = update.dense().double()
    torch.testing.assert_close(directions_OK @ directions_OK.T @ delta_OI, svd(delta_OI, 2), atol=1e-6, rtol=0)
    assert is_unique
