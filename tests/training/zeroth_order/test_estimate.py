"""The estimate of the gradient, and what clipping promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sails_align.training.zeroth_order.estimate import directions, noisy_sum, slopes
from sails_align.training.zeroth_order.randomness import torch_generator

SLOPES = st.lists(st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf]), max_size=6)


def of(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_mean_over_directions_is_the_gradient() -> None:
    gradient = of([1.0, -2.0, 0.5])
    (z_N3,) = directions([nn.Parameter(torch.zeros(200_000, 3, dtype=torch.float64))], torch_generator("a", 0))
    estimate = (z_N3 * (z_N3 @ gradient)[:, None]).mean(0)
    torch.testing.assert_close(estimate, gradient, atol=0.03, rtol=0)
    assert not torch.allclose((z_N3[0] @ gradient) * z_N3[0], gradient, atol=0.03), "one direction is not enough"


@pytest.mark.parametrize("eps", [1e-4, 1.0])
def test_slopes_of_a_quadratic_are_its_directional_derivatives(eps: float) -> None:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(4, dtype=torch.float64)), nn.Parameter(torch.randn(2, dtype=torch.float64))
    matrix_B44 = torch.randn(3, 4, 4, dtype=torch.float64)

    def losses() -> Tensor:
        return torch.einsum("i,bij,j->b", weight, matrix_B44, weight) + bias.square().sum()

    z = directions([weight, bias], torch_generator("b", 1))
    start = [parameter.detach().clone() for parameter in (weight, bias)]
    slope_B, loss_B = slopes([weight, bias], z, eps, losses)
    for parameter, at_start in zip((weight, bias), start, strict=True):
        assert torch.equal(parameter, at_start)
    for example in range(3):
        gradients = torch.autograd.grad(losses()[example], [weight, bias])
        exact = sum((g * each).sum() for g, each in zip(gradients, z, strict=True))
        assert slope_B[example].item() == pytest.approx(float(exact), abs=1e-8)
    assert (loss_B >= losses().detach() - 1e3 * eps).all()


def test_parameters_are_restored_bit_for_bit_also_if_the_model_fails() -> None:
    """Adding and subtracting in place, as MeZO does, would not: the control."""
    torch.manual_seed(1)
    parameter = nn.Parameter(torch.randn(1000))
    z, start = directions([parameter], torch_generator("c")), parameter.detach().clone()

    def fails() -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        slopes([parameter], z, 1e-3, fails)
    assert torch.equal(parameter, start)
    slopes([parameter], z, 1e-3, lambda: parameter.sum()[None])
    assert torch.equal(parameter, start)
    moved = start + 1e-3 * z[0] - 2e-3 * z[0] + 1e-3 * z[0]
    assert not torch.equal(moved, start)
    torch.testing.assert_close(moved, start, atol=1e-6, rtol=0)


def test_golden_clip() -> None:
    assert noisy_sum(of([-5, 0.3, 2]), 1.0, 0.0, 0.0) / 3 == pytest.approx(0.1, abs=1e-12)
    assert noisy_sum(of([-5, 0.3, 2]), 1.0, 2.0, 0.5) == pytest.approx(1.3, abs=1e-12)
    assert noisy_sum(of([]), 30.0, 2.0, -1.0) == -60.0
    assert noisy_sum(of([-5, 0.3, 2]), 1e9, 0.0, 0.0) == pytest.approx(-2.7, abs=1e-12)


@settings(deadline=None)
@given(SLOPES, st.floats(-1e9, 1e9) | st.just(math.nan), st.floats(-1e9, 1e9), st.floats(0.01, 100))
def test_one_example_moves_the_sum_by_the_clip(others: list[float], one: float, other: float, clip: float) -> None:
    without, with_one, with_other = (noisy_sum(of([*others, *more]), clip, 1.0, 0.3) for more in ([], [one], [other]))
    assert math.isfinite(without)
    assert abs(with_one - without) <= clip * (1 + 1e-9)
    assert abs(with_one - with_other) <= 2 * clip * (1 + 1e-9)
