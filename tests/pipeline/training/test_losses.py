"""Losses against loops over plain float64 numbers, closed forms and published limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.training import losses
from tests.pipeline.training.builders import ce, kl, softmax

FINITE = st.floats(-30, 30, width=32)


def random(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("shape", [(6, 5), (1, 7), (9, 2)])
def test_cross_entropy_spreads_label_smoothing_over_all_classes(eps: float, shape: tuple[int, int]) -> None:
    s, y = random(*shape), torch.arange(shape[0]) % shape[1]
    expected = [ce(row, int(label), eps) for row, label in zip(s.tolist(), y, strict=True)]
    assert losses.cross_entropy(s, y, eps).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(
    rows=st.lists(
        st.tuples(st.lists(FINITE, min_size=4, max_size=4), st.lists(FINITE, min_size=4, max_size=4)),
        min_size=1,
        max_size=4,
    ),
    tau=st.floats(0.5, 20),
)
@settings(max_examples=60, deadline=None)
def test_kd_is_tau_squared_times_the_divergence_from_target_to_prediction(
    rows: list[tuple[list[float], list[float]]], tau: float
) -> None:
    s, t = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    expected = [kl(softmax(b, tau), a, tau) for a, b in rows]
    assert losses.kd(s, t, tau).tolist() == pytest.approx(expected, rel=1e-4, abs=2e-5 * tau**2)


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("batch", [1, 6])
def test_the_target_is_the_first_argument_of_the_divergence(n: int, batch: int) -> None:
    s, t = random(batch, n, seed=1), random(batch, n, seed=2, scale=1.0)
    forward = sum(kl(softmax(b, 2.0), a, 2.0) for a, b in zip(s.tolist(), t.tolist(), strict=True)) / batch
    backward = sum(kl(softmax(a, 2.0), b, 2.0) for a, b in zip(s.tolist(), t.tolist(), strict=True)) / batch
    assert abs(forward - backward) > 1e-4
    assert losses.kd(s, t, 2.0).mean().item() == pytest.approx(forward, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_the_gradient_of_kd_is_tau_times_the_difference_of_probabilities(tau: float) -> None:
    s, t = random(5, 6, seed=3).requires_grad_(), random(5, 6, seed=4).requires_grad_()
    losses.kd(s, t, tau).sum().backward()
    assert s.grad is not None
    for grad, a, b in zip(s.grad.tolist(), s.tolist(), t.tolist(), strict=True):
        expected = [tau * (q - p) for q, p in zip(softmax(a, tau), softmax(b, tau), strict=True)]
        assert grad == pytest.approx(expected, abs=2e-6 * tau)
    assert t.grad is None, "targets are held fixed"


def test_at_high_temperature_kd_matches_logits() -> None:
    """Hinton et al. 2015, eq. 4: for zero-mean logits the gradient tends to (s - t) / N."""
    s, t = random(4, 5, seed=5, scale=1.0), random(4, 5, seed=6, scale=1.0)
    s, t = (s - s.mean(1, keepdim=True)).requires_grad_(), t - t.mean(1, keepdim=True)
    losses.kd(s, t, 300.0).sum().backward()
    torch.testing.assert_close(s.grad, (s.detach() - t) / 5, rtol=0.02, atol=2e-3)


def test_equal_logits_cost_nothing_and_pull_nowhere() -> None:
    s = random(3, 8, seed=7).requires_grad_()
    value = losses.kd(s, s.detach().clone(), 4.0).mean()
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert s.grad is not None
    assert s.grad.abs().max().item() < 1e-6


def test_huge_logits_do_not_zero_the_loss() -> None:
    """The research code clamped log-probabilities to [1e-8, 1], which made every loss zero."""
    s = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    t = torch.tensor([[1e4, -1e4], [1e4, -1e4]])
    values = losses.kd(s, t, 4.0)
    values.sum().backward()
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()
    assert values.tolist() == pytest.approx([0.0, 16 * 2e4 / 4], rel=1e-5)
    assert losses.cross_entropy(s, torch.tensor([0, 0])).tolist() == pytest.approx([0.0, 2e4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_taken_to_float32_first(dtype: torch.dtype) -> None:
    s, t = random(4, 6, seed=8).to(dtype), random(4, 6, seed=9).to(dtype)
    y = torch.tensor([0, 1, 2, 3])
    for value, same in (
        (losses.kd(s, t, 4.0), losses.kd(s.float(), t.float(), 4.0)),
        (losses.cross_entropy(s, y, 0.1), losses.cross_entropy(s.float(), y, 0.1)),
        (losses.ib_kl(s, t), losses.ib_kl(s.float(), t.float())),
        (losses.certainty_weights(t, 0.1, 2.0), losses.certainty_weights(t.float(), 0.1, 2.0)),
    ):
        assert value.dtype == torch.float32
        assert torch.equal(value, same)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.kd(s.float(), t.float(), 4.0), losses.kd(s.float(), t.float(), 4.0).float())
    big = torch.tensor([[6e4, -6e4]], dtype=torch.float16)
    assert torch.isfinite(losses.kd(big, -big, 1.0))


def test_a_one_hot_target_gives_cross_entropy() -> None:
    s, y = random(5, 4, seed=10), torch.tensor([3, 1, 0, 2, 2])
    hot = torch.nn.functional.one_hot(y, 4).float()
    assert losses.kl_to(s, hot, 1.0).tolist() == pytest.approx(
        [ce(r, int(k)) for r, k in zip(s.tolist(), y, strict=True)], rel=1e-5
    )


def test_the_bottleneck_costs_nothing_at_the_standard_normal_and_half_the_square_of_the_mean_beside_it() -> None:
    mu = random(3, 4, seed=11)
    zero = torch.zeros(3, 4)
    assert losses.ib_kl(zero, zero).tolist() == [0.0] * 3
    assert losses.ib_kl(mu, zero).tolist() == pytest.approx([sum(v * v for v in r) / 2 for r in mu.tolist()], rel=1e-5)


def test_the_bottleneck_is_the_divergence_between_gaussians() -> None:
    mu, logvar = random(6, 5, seed=12), random(6, 5, seed=13, scale=2.0)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu.double(), (logvar.double() / 2).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(losses.ib_kl(mu, logvar).double(), expected.sum(1), rtol=1e-5, atol=1e-5)


def test_the_bottleneck_measures_the_sigma_that_is_drawn_with_floor_included() -> None:
    logvar = torch.tensor([[-6.0, 0.0, 1.0]], requires_grad=True)  # sigma 0.0498, 1, 1.649
    found = losses.ib_kl(torch.zeros(1, 3), logvar, min_std=0.5)
    # by hand: 1/2 (0.25 - 1 - log 0.25) + 0 + 1/2 (e - 1 - 1)
    assert found.item() == pytest.approx(0.3181471806 + 0.3591409142, rel=1e-6)
    found.backward()
    assert logvar.grad is not None
    assert logvar.grad[0, 0] == 0, "below the floor sigma does not depend on it"


def test_the_bottleneck_keeps_tiny_variances_apart_from_rounding() -> None:
    logvar = torch.full((1, 1), 1e-3)
    assert losses.ib_kl(torch.zeros(1, 1), logvar).item() == pytest.approx(0.5 * (math.expm1(1e-3) - 1e-3), rel=1e-3)


def test_certainty_is_the_clamped_mean_precision_and_carries_no_gradient() -> None:
    logvar = torch.tensor([[0.0, 0.0], [3.0, 5.0], [-3.0, -2.0], [0.2, -0.4]], requires_grad=True)
    expected = [min(max(sum(math.exp(-v) for v in r) / 2, 0.1), 1.2) for r in logvar.tolist()]
    weights = losses.certainty_weights(logvar, 0.1, 1.2)
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert weights[1].item() == pytest.approx(0.1)
    assert weights[2].item() == pytest.approx(1.2)
    assert not weights.requires_grad


def test_the_penalty_is_the_mean_over_tensors_of_their_mean_squares() -> None:
    tensors = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[4.0]])]
    assert losses.mean_square(tensors).item() == pytest.approx((14 / 3 + 16) / 2)
    assert losses.mean_square([]).item() == 0.0
