"""Losses against loops over plain float64 numbers, closed forms and published limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.training import losses
from tests.pipeline.training.builders import ce, kl, softmax


def random(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("shape", [(6, 5), (1, 7), (9, 2)])
def test_cross_entropy_spreads_label_smoothing_over_all_classes(eps: float, shape: tuple[int, int]) -> None:
    s, y = random(*shape), torch.arange(shape[0]) % shape[1]
    expected = [ce(row, int(label), eps) for row, label in zip(s.tolist(), y, strict=True)]
    assert losses.cross_entropy(s, y, eps).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0, 30.0])
def test_kd_is_tau_squared_times_the_divergence_from_target_to_prediction(tau: float, scale: float) -> None:
    extremes = torch.tensor([[30.0, -30.0, 0.0, 30.0], [-30.0, 30.0, 0.0, 0.0]])
    s = torch.cat([random(9, 4, seed=1, scale=scale).clamp(-30, 30), extremes])
    t = torch.cat([random(9, 4, seed=2, scale=scale).clamp(-30, 30), extremes.flip(0)])
    expected = [kl(softmax(b, tau), a, tau) for a, b in zip(s.tolist(), t.tolist(), strict=True)]
    assert losses.kd(s, t, tau).tolist() == pytest.approx(expected, rel=1e-4, abs=2e-5 * tau**2)


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


def dkd(row: list[float], p: list[float], y: int, tau: float, alpha: float, beta: float) -> float:
    """Zhao et al. 2022, by its words: KL between (label, rest), and KL among the others, of target and prediction."""
    q = softmax(row, tau)

    def divergence(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / z) for x, z in zip(a, b, strict=True) if x > 0)

    rest_p, rest_q = ([v for i, v in enumerate(d) if i != y] for d in (p, q))
    tckd = divergence([p[y], sum(rest_p)], [q[y], sum(rest_q)])
    among = [v / sum(rest_p) for v in rest_p] if sum(rest_p) > 0 else [0.0] * len(rest_p)
    nckd = divergence(among, [v / sum(rest_q) for v in rest_q])
    return tau**2 * (alpha * tckd + beta * nckd)


@pytest.mark.parametrize(("n", "tau", "alpha", "beta"), [(3, 1.0, 1.0, 8.0), (7, 4.0, 0.5, 2.0), (5, 2.0, 0.0, 1.0)])
def test_dkd_by_loops(n: int, tau: float, alpha: float, beta: float) -> None:
    s, p, y = random(9, n), random(9, n, seed=1).softmax(1), torch.arange(9) % n
    expected = [dkd(*row, tau, alpha, beta) for row in zip(s.tolist(), p.tolist(), y.tolist(), strict=True)]
    assert losses.dkd(s, p, y, tau, alpha, beta).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(
    st.lists(st.floats(-20, 20), min_size=4, max_size=4),
    st.lists(st.floats(-6, 6), min_size=4, max_size=4),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_dkd_with_the_targets_own_weight_is_the_plain_divergence(s: list[float], t: list[float], y: int) -> None:
    """KL = TCKD + (1 - p_y) NCKD (eq. 6)."""
    p = torch.tensor([softmax(t)])
    found = losses.dkd(torch.tensor([s]), p, torch.tensor([y]), 2.0, 1.0, 1.0 - p[0, y].item())
    assert found.item() == pytest.approx(losses.kl_to(torch.tensor([s]), p, 2.0).item(), rel=1e-3, abs=2e-4)


def test_the_gradient_of_dkd_is_that_of_the_plain_divergence_in_float64() -> None:
    s, p, y = random(6, 5).double(), random(6, 5, seed=1).double().softmax(1), torch.arange(6) % 5
    a, b = s.float().requires_grad_(), s.clone().requires_grad_()
    losses.dkd(a, p, y, 3.0, 0.7, 2.5).sum().backward()
    log_q = (b / 3).log_softmax(1)
    total = torch.zeros((), dtype=torch.float64)
    for i, k in enumerate(y.tolist()):
        rest = [c for c in range(5) if c != k]
        q_rest = log_q[i, rest].exp().sum()
        p_rest = p[i, rest].sum()
        total = total + 0.7 * (p[i, k] * (p[i, k].log() - log_q[i, k]) + p_rest * (p_rest.log() - q_rest.log()))
        for c in rest:
            share = p[i, c] / p_rest
            total = total + 2.5 * share * (share.log() - (log_q[i, c] - q_rest.log()))
    (9 * total).backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top", [1.0, 1 - 1e-7])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_dkd_is_finite_with_one_hot_targets_and_huge_logits(top: float, scale: float) -> None:
    """The published code masks by subtracting 1000 from a logit, and takes the log of a sum of rounded softmaxes."""
    s = torch.tensor([[scale, -scale, 0.0], [-scale, scale, scale], [0.0, 0.0, scale]], requires_grad=True)
    p = torch.full((3, 3), (1 - top) / 2)
    p[:, 0] = top
    for y in (torch.zeros(3, dtype=torch.long), torch.tensor([1, 2, 0])):
        value = losses.dkd(s, p, y, 4.0, 1.0, 8.0)
        (grad,) = torch.autograd.grad(value.sum(), s)
        assert torch.isfinite(value).all()
        assert torch.isfinite(grad).all()
        assert (value >= -1e-3).all()
    if scale == 1e4:
        # a target on the label alone: TCKD is the label's negative log-likelihood, NCKD has nothing to say
        value = losses.dkd(s, torch.eye(3)[[0, 0, 0]], torch.zeros(3, dtype=torch.long), 4.0, 1.0, 8.0)
        assert value.tolist() == pytest.approx([0.0, 16 * (2e4 / 4 + math.log(2)), 16 * 1e4 / 4], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("clip", [None, 4.0])
def test_the_feature_distance_is_a_clipped_sum_of_huber_losses(beta: float, clip: float | None) -> None:
    feature, mu = random(6, 5, scale=2.0).requires_grad_(), random(6, 5, seed=1, scale=1.0)
    found = losses.feature_distance(feature, mu, beta, clip)
    found.sum().backward()
    assert feature.grad is not None
    clipped = 0
    for i, (row, other) in enumerate(zip(feature.tolist(), mu.tolist(), strict=True)):
        gaps = [a - b for a, b in zip(row, other, strict=True)]
        value = sum(g * g / (2 * beta) if abs(g) < beta else abs(g) - beta / 2 for g in gaps)
        slope = [g / beta if abs(g) < beta else math.copysign(1, g) for g in gaps]
        if clip is not None and value > clip:
            value, slope, clipped = clip, [0.0] * 5, clipped + 1
        assert found[i].item() == pytest.approx(value, rel=1e-5)
        assert feature.grad[i].tolist() == pytest.approx(slope, abs=1e-5)
    assert (0 < clipped < 6) == (clip is not None) or beta == 5.0


def test_normalised_features_have_unit_length_in_float32() -> None:
    x = random(4, 6).half()
    assert torch.equal(losses.normalised(x, "none"), x.float())
    for row, expected in zip(losses.normalised(x, "l2").tolist(), x.tolist(), strict=True):
        length = math.sqrt(sum(v * v for v in expected))
        assert row == pytest.approx([v / length for v in expected], rel=1e-5)
    assert torch.isfinite(losses.normalised(torch.zeros(1, 3), "l2")).all()


@pytest.mark.parametrize(
    ("kd", "cross_entropy", "expected"),
    [(2.0, 4.0, 1.0), (5.0, 4.0, 1.0), (10.0, 4.0, 0.5), (0.0, 0.0, 1.0), (3.0, 0.0, 0.0)],
)
def test_the_ratio_clamp_is_a_detached_factor(kd: float, cross_entropy: float, expected: float) -> None:
    term, other = torch.tensor(kd, requires_grad=True), torch.tensor(cross_entropy, requires_grad=True)
    factor = losses.ratio_factor(term, other, 1.25)
    assert factor.item() == pytest.approx(expected)
    assert not factor.requires_grad
    (factor * term).backward()
    assert term.grad is not None
    assert term.grad.item() == pytest.approx(expected), "the gradient is scaled as the value is"


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("value", [0.5, 20.0, 20.5, 55.0, 1e4])
def test_the_loss_clamp_and_its_gradient(mode: str, value: float) -> None:
    loss = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    found = losses.clamp_loss(loss, 20.0, mode, loss.detach())
    found.backward()
    assert loss.grad is not None
    if value <= 20:
        expected, slope = value, 1.0
    elif mode == "hard":
        expected, slope = 20.0, 0.0
    else:
        expected, slope = 20 + math.log(1 + value - 20), 1 / (1 + value - 20)
    assert found.item() == pytest.approx(expected)
    assert loss.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_several_processes_clamp_by_their_common_loss(mode: str) -> None:
    """The mean of their clamped losses is the clamped mean, also where one of them alone lies below the bound."""
    parts = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, 47.0)]
    overall = torch.stack(parts).mean().detach()
    both = torch.stack([losses.clamp_loss(p, 20.0, mode, overall) for p in parts]).mean()
    both.backward()
    alone = torch.tensor(25.0, dtype=torch.float64, requires_grad=True)
    whole = losses.clamp_loss(alone, 20.0, mode, alone.detach())
    whole.backward()
    assert both.item() == pytest.approx(whole.item())
    assert alone.grad is not None
    assert [float(p.grad) for p in parts if p.grad is not None] == pytest.approx([alone.grad.item() / 2] * 2)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_a_clamp_hides_no_loss_that_is_not_finite(mode: str) -> None:
    for bad in (torch.tensor(math.nan), torch.tensor(math.inf)):
        assert not torch.isfinite(losses.clamp_loss(bad, 20.0, mode, bad))
