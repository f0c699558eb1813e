"""Plain distillation against the formula, and against torchdistill."""

import pytest
import torch
from torch import Tensor

from pipeline.config.methods.kd import KdConfig
from pipeline.training import losses
from tests.pipeline.training.methods.logit_reference import (
    check_equal_networks_cost_nothing,
    check_limits,
    check_step,
    errors,
    kl64,
    labels,
    logits,
    relative_error,
    softmax64,
    value_and_slope,
)


def loss(s: Tensor, ts: list[Tensor], y: Tensor, tau: float = 4.0) -> Tensor:
    return losses.kd(s, ts[0], tau)


def loop(s: Tensor, ts: list[Tensor], y: Tensor, tau: float = 4.0) -> Tensor:
    pairs = zip(s, ts[0], strict=True)
    return torch.stack([tau**2 * kl64(softmax64(t, tau), softmax64(row, tau)) for row, t in pairs])


def standardised_loop(x: Tensor) -> Tensor:
    """One sample at a time; std by hand, over N - 1."""
    rows = []
    for row in x.double():
        mean = sum(row) / len(row)
        rows.append((row - mean) / ((sum((v - mean) ** 2 for v in row) / (len(row) - 1)) ** 0.5 + 1e-7))
    return torch.stack(rows)


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize(("b", "n"), [(16, 10), (1, 100), (5, 2)])
def test_value_and_gradient_are_those_of_the_formula(b: int, n: int, tau: float) -> None:
    def timed(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
        return loss(s, ts, y, tau) if s.dtype == torch.float32 else loop(s, ts, y, tau)

    assert max(errors(timed, timed, logits(b, n, 1), [logits(b, n, 2)], labels(b, n))) < 2e-6


def test_limits() -> None:
    check_limits(loss)
    check_equal_networks_cost_nothing(loss)


def torchdistill(kind: str, s: Tensor, t: Tensor, y: Tensor, tau: float, **given: float) -> Tensor:
    from torchdistill.losses import mid_level

    made = getattr(mid_level, kind)("net", "output", "net", "output", temperature=tau, **given)
    return made({"net": {"output": s}}, {"net": {"output": t}}, y)


def test_torchdistill_has_the_same_loss() -> None:
    """Its loss is alpha CE + beta tau^2 KL; with alpha 0 it drops tau^2, and with alpha left out it cannot be made."""
    s, t, y = logits(16, 100, 1), logits(16, 100, 2), labels(16, 100)

    def theirs(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
        return torchdistill("KDLoss", s, ts[0], y, 4.0, alpha=0.1, beta=0.9)

    def ours(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
        return 0.1 * losses.cross_entropy(s, y).mean() + 0.9 * loss(s, ts, y).mean()

    for a, b in zip(value_and_slope(ours, s, [t], y), value_and_slope(theirs, s, [t], y), strict=True):
        assert relative_error(a, b) < 2e-6
    assert relative_error(loss(s, [t], y).mean(), 16 * torchdistill("KDLoss", s, t, y, 4.0, alpha=0.0)) < 2e-6


@pytest.mark.parametrize(("b", "n"), [(16, 10), (1, 100), (5, 2)])
def test_standardised_logits_have_mean_0_and_standard_deviation_1(b: int, n: int) -> None:
    x = 2 + logits(b, n, 3)
    z = losses.standardised(x)
    torch.testing.assert_close(z.mean(1), torch.zeros(b), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(1), torch.ones(b))
    weights = logits(b, n, 4).abs()  # any: the sum of z itself has no gradient

    def ours(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
        return weights * losses.standardised(s)

    def formula(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
        return weights.double() * standardised_loop(s)

    value, slope = errors(ours, formula, x, [], labels(b, n))
    assert value < 2e-6
    if n > 2:  # two standardised logits are always +-0.707: no gradient, but for eps
        assert slope < 5e-6


def test_standardised_distillation_is_torchdistills() -> None:
    s, t, y = logits(16, 100, 1), logits(16, 100, 2), labels(16, 100)

    def theirs(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
        return torchdistill("LogitStdKDLoss", s, ts[0], y, 2.0, alpha=0.1, beta=9.0)

    def ours(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
        kd = losses.kd(losses.standardised(s), losses.standardised(ts[0]), 2.0)
        return 0.1 * losses.cross_entropy(s, y).mean() + 9.0 * kd.mean()

    for a, b in zip(value_and_slope(ours, s, [t], y), value_and_slope(theirs, s, [t], y), strict=True):
        assert relative_error(a, b) < 5e-6


def test_limits_of_standardised_logits() -> None:
    def standard(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
        return losses.kd(losses.standardised(s), losses.standardised(ts[0]), 2.0)

    check_limits(standard)
    check_equal_networks_cost_nothing(standard)
    s, t, y = logits(4, 6, 1), logits(4, 6, 2), labels(4, 6)
    torch.testing.assert_close(standard(3 * s + 1, [t / 5 - 2], y), standard(s, [t], y))
    value, slope = value_and_slope(standard, torch.full((2, 6), 3.0), [t[:2]], y[:2])
    assert torch.isfinite(value).all(), "equal logits"
    assert torch.isfinite(slope).all()


def test_the_step_computes_the_loss() -> None:
    check_step(KdConfig, loss)
