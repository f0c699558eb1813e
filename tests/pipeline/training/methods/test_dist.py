"""DIST against the formula, against torchdistill, and at its limits: constant rows and columns."""

from functools import partial

import pytest
import torch
from torch import Tensor

from pipeline.config.methods.dist import DistConfig
from pipeline.training.methods import dist
from tests.pipeline.training.methods.logit_reference import (
    check_equal_networks_cost_nothing,
    check_limits,
    check_step,
    errors,
    labels,
    logits,
    relative_error,
    softmax64,
    value_and_slope,
)

TAU, BETA, GAMMA = 4.0, 1.0, 0.5


def between(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    q, p = (torch.softmax(x.float() / TAU, dim=1) for x in (s, ts[0]))
    return dist.between_classes(q, p, TAU)


def within(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    q, p = (torch.softmax(x.float() / TAU, dim=1) for x in (s, ts[0]))
    return dist.within_classes(q, p, TAU)


def loss(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    return BETA * between(s, ts, y).mean() + GAMMA * within(s, ts, y)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r of two vectors: covariance over the product of standard deviations."""
    a_mean, b_mean = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - a_mean) * (z - b_mean) for x, z in zip(a, b, strict=True))
    return covariance / (sum((x - a_mean) ** 2 for x in a) * sum((z - b_mean) ** 2 for z in b)) ** 0.5


def loop(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    q, p = (torch.stack([softmax64(row, TAU) for row in x]) for x in (s, ts[0]))
    rows = sum(1 - correlation(q[i], p[i]) for i in range(len(q))) / len(q)
    columns = sum(1 - correlation(q[:, c], p[:, c]) for c in range(q.shape[1])) / q.shape[1]
    return TAU**2 * (BETA * rows + GAMMA * columns)


@pytest.mark.parametrize(("b", "n"), [(16, 10), (8, 100), (5, 3)])
def test_value_and_gradient_are_those_of_the_formula(b: int, n: int) -> None:
    assert max(errors(loss, loop, logits(b, n, 1), [logits(b, n, 2)], labels(b, n))) < 1e-5


def test_torchdistill_has_the_same_loss_but_for_its_eps() -> None:
    """It bounds each length by 1e-8 from below; here vectors shorter than 1e-6 of their mean's count as constant."""
    from torchdistill.losses.mid_level import DISTLoss

    made = DISTLoss("net", "output", "net", "output", beta=BETA, gamma=GAMMA, tau=TAU)

    def theirs(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
        return made({"net": {"output": s}}, {"net": {"output": ts[0]}})

    s, t, y = logits(16, 100, 1), logits(16, 100, 2), labels(16, 100)
    for a, b in zip(value_and_slope(loss, s, [t], y), value_and_slope(theirs, s, [t], y), strict=True):
        assert relative_error(a, b) < 1e-5


def test_limits() -> None:
    check_limits(loss)
    check_equal_networks_cost_nothing(between)
    s = logits(5, 7, 3)
    value, slope = value_and_slope(loss, s, [s.clone()], labels(5, 7))
    assert value.abs() < 1e-5
    assert slope.abs().max() < 1e-5


def test_scale_and_shift_of_probabilities_do_not_matter() -> None:
    a, b = logits(6, 9, 1).abs(), logits(6, 9, 2).abs()
    torch.testing.assert_close(dist.pearson(1e-12 * a, b), dist.pearson(a, b))
    torch.testing.assert_close(dist.pearson(3 * a + 1, -b), -dist.pearson(a, b))


def test_a_constant_row_or_column_correlates_with_nothing_and_pulls_nowhere() -> None:
    """A student that says the same of all samples, as one with a new head does, would have an unbounded gradient."""
    s, t = torch.zeros(5, 7), logits(5, 7, 2)
    for part in (between, within):
        value, slope = value_and_slope(part, s, [t], labels(5, 7))
        torch.testing.assert_close(value, torch.full_like(value, TAU**2))
        assert torch.equal(slope, torch.zeros_like(slope))
    value, slope = value_and_slope(within, s[:1], [t[:1]], labels(1, 7))
    assert value == TAU**2, "a batch of one has no correlation within classes"
    assert torch.equal(slope, torch.zeros_like(slope))


def test_the_step_computes_the_loss() -> None:
    check_step(partial(DistConfig, beta=BETA, gamma=GAMMA), loss)
