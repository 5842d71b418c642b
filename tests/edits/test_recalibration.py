"""Entries that work against safety are removed, and the others make up for them."""

import pytest
import torch
from torch import Tensor

from sails_align.edits.options import IrrOptions
from sails_align.edits.recalibration import Thinned, damped, thin


def rows(*values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


INPUTS_TI = rows((1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 0), (1, 1, 0, 0), (0, 1, 1, 1))
DELTA_OI = rows((0.3, -0.2, 0.1, 0.4), (-0.1, 0.2, 0.3, -0.4))
VECTOR_OI = rows((1, 1, -1, 1), (-1, -1, 1, 1))
FISHER_OI = rows((0.1, 0.9, 0.5, 0.2), (0.3, 0.8, 0.1, 0.4))


def example(recalibrate: str, sparsity: float = 0.0, blocksize: int = 128, **changed: Tensor) -> Thinned:
    """The worked example, whose results are those of the authors' routine (damping 0.01, one block)."""
    given = {"delta_OI": DELTA_OI, "vector_OI": VECTOR_OI, "fisher_OI": FISHER_OI, "gram_II": gram(INPUTS_TI)}
    options = IrrOptions(recalibrate=recalibrate, sparsity=sparsity, blocksize=blocksize, damping=0.01)
    return thin(**{**given, **changed}, options=options)


def gram(inputs_TI: Tensor) -> Tensor:
    return 2 * inputs_TI.T @ inputs_TI


def random_case(seed: int, n_outputs: int = 5, n_inputs: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (n_outputs, n_inputs)
    return {
        "delta_OI": draw(*shape),
        "vector_OI": draw(*shape),
        "fisher_OI": draw(*shape).square(),
        "gram_II": gram(draw(30, n_inputs)),
    }


@pytest.mark.parametrize(
    ("recalibrate", "sparsity", "expected"),
    [
        ("none", 0.0, ((0.3, 0, 0, 0.4), (-0.1, 0, 0.3, 0))),
        ("official", 0.0, ((0.3, 0, 0, 0.300826), (-0.1, 0, 0.339995, 0))),
        ("none", 0.5, ((0.3, 0, 0.1, 0.4), (-0.1, 0, 0.3, -0.4))),
        ("official", 0.5, ((0.3, 0, 0.060005, 0.280990), (-0.1, 0, 0.339995, -0.280990))),
        ("exact", 0.0, ((0.240495, 0, 0, 0.320498), (-0.198765, 0, 0.201235, 0))),
    ],
)
def test_the_worked_example(recalibrate: str, sparsity: float, expected: tuple) -> None:
    found = example(recalibrate, sparsity).delta
    torch.testing.assert_close(found, rows(*expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("recalibrate", "errors"), [("none", (0.1, 0.28)), ("official", (0.07, 0.2992)), ("exact", (0.064, 0.24))]
)
def test_errors_of_the_outputs(recalibrate: str, errors: tuple[float, float]) -> None:
    """The authors' rule makes the second row worse than no recalibration."""
    change_OI = example(recalibrate).delta - DELTA_OI
    found_O = (INPUTS_TI @ change_OI.T).square().sum(0)
    torch.testing.assert_close(found_O, torch.tensor(errors, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparsity", [0.0, 0.4])
def test_no_rule_has_a_smaller_damped_error_than_the_exact_one(seed: int, sparsity: float) -> None:
    case = random_case(seed)
    hessian_II = damped(case["gram_II"], 0.01)

    def errors(recalibrate: str) -> Tensor:
        change_OI = example(recalibrate, sparsity, **case).delta - case["delta_OI"]
        return ((change_OI @ hessian_II) * change_OI).sum(1)

    exact_O = errors("exact")
    assert (exact_O <= errors("official") + 1e-10).all()
    assert (exact_O <= errors("none") + 1e-10).all()
    assert (errors("official") < errors("none")).any()


@pytest.mark.parametrize("recalibrate", ["none", "official", "exact"])
def test_ends(recalibrate: str) -> None:
    case = random_case(0)
    same = {**case, "vector_OI": case["delta_OI"].sign()}
    against = {**case, "vector_OI": -case["delta_OI"]}
    assert torch.equal(example(recalibrate, **same).delta, case["delta_OI"])
    assert not example(recalibrate, **same).removed.any()
    assert not example(recalibrate, **against).delta.any()
    assert example(recalibrate, **against).removed.all()
    assert torch.equal(example(recalibrate, 1.0, **case).delta, case["delta_OI"])


@pytest.mark.parametrize("recalibrate", ["official", "exact"])
def test_one_removed_entry_is_made_up_for_as_obs_does(recalibrate: str) -> None:
    case = random_case(1, n_outputs=1)
    delta_OI = case["delta_OI"].abs()
    vector_OI = torch.ones_like(delta_OI)
    vector_OI[0, 0] = -1
    inverse_II = torch.linalg.inv(damped(case["gram_II"], 0.01))
    expected_I = delta_OI[0] - delta_OI[0, 0] * inverse_II[0] / inverse_II[0, 0]
    found = example(recalibrate, **{**case, "delta_OI": delta_OI, "vector_OI": vector_OI}).delta[0]
    torch.testing.assert_close(found, expected_I, atol=1e-10, rtol=0)


@pytest.mark.parametrize("recalibrate", ["official", "exact"])
def test_uncorrelated_inputs_leave_the_others_as_they_are(recalibrate: str) -> None:
    case = {**random_case(2), "gram_II": torch.eye(9, dtype=torch.float64)}
    found, plain = (example(rule, 0.3, **case).delta for rule in (recalibrate, "none"))
    torch.testing.assert_close(found, plain, atol=1e-12, rtol=0)
    scaled = random_case(2)
    one, other = (example(recalibrate, **{**scaled, "gram_II": scaled["gram_II"] * c}).delta for c in (1, 7))
    torch.testing.assert_close(one, other, atol=1e-10, rtol=0)  # n in H = 2/n sum x x^T does not matter


def test_the_share_is_kept_within_each_block_of_columns() -> None:
    case = random_case(3, n_outputs=6, n_inputs=8)
    case["fisher_OI"][:, :4] += 100  # so that without blocks none of the first columns would be kept
    found = example("none", 0.5, **case, blocksize=4).removed
    candidates = case["delta_OI"].sign() != case["vector_OI"].sign()
    for part in (slice(0, 4), slice(4, 8)):
        fisher, here = case["fisher_OI"][:, part], candidates[:, part]
        n_kept = int(here.sum()) // 2
        assert int(found[:, part].sum()) == int(here.sum()) - n_kept
        kept = here & ~found[:, part]
        assert fisher[kept].max() < fisher[found[:, part]].min(), "those with the lowest Fisher information are kept"
    assert not torch.equal(found, example("none", 0.5, **case).removed)
    assert not (found & ~candidates).any()


def test_blocks_of_columns_are_made_up_for_by_those_to_their_right() -> None:
    case = random_case(4)
    case["vector_OI"][:, 2:] = 1e9  # candidates do not depend on what was moved here
    delta_OI = case["delta_OI"]
    delta_OI[:, 2:] = delta_OI[:, 2:].abs() + 50
    one, several = (example("official", **case, blocksize=size).delta for size in (128, 2))
    torch.testing.assert_close(one, several, atol=1e-9, rtol=0)
    assert (several[:, 4:] - delta_OI[:, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("recalibrate", ["official", "none"])
def test_a_control_removes_as_many_entries_of_each_block_and_others(recalibrate: str) -> None:
    case = random_case(5)
    case["vector_OI"][:, 4:] = 1e9  # candidates do not depend on what was moved here
    options = {"recalibrate": recalibrate, "blocksize": 4}
    plain, control, other = (
        thin(**case, options=IrrOptions(**options, control_seed=seed), name="layer").removed for seed in (None, 0, 1)
    )
    if recalibrate == "none":
        assert [int(plain[:, part].sum()) for part in (slice(4), slice(4, 8))] == [
            int(control[:, part].sum()) for part in (slice(4), slice(4, 8))
        ]
    assert plain[:, :4].sum() == control[:, :4].sum()
    assert not torch.equal(plain, control)
    assert not torch.equal(control, other)


def test_inputs_that_are_always_zero() -> None:
    case = random_case(6)
    case["gram_II"][3] = case["gram_II"][:, 3] = 0
    assert not example("official", **case).delta[:, 3].any()
    kept = ~example("exact", **case).removed[:, 3]
    assert torch.equal(example("exact", **case).delta[kept, 3], case["delta_OI"][kept, 3])


@pytest.mark.parametrize("recalibrate", ["official", "exact"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_inputs_does_not_matter(recalibrate: str, scale: float) -> None:
    """Also if some inputs are always zero, which upstream counts as 1 beside others of any scale."""
    case = random_case(7)
    for zero in ([], [2, 5], list(range(9))):
        gram_II = case["gram_II"].clone()
        gram_II[zero] = gram_II[:, zero] = 0
        one, other = (
            example(recalibrate, 0.3, **{**case, "gram_II": gram_II * factor}).delta for factor in (1, scale**2)
        )
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
    ones = torch.diag(damped(torch.zeros(3, 3, dtype=torch.float64), 0.01))
    torch.testing.assert_close(ones, torch.full_like(ones, 1.01))
