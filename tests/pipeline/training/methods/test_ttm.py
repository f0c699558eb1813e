"""Transformed teacher matching against the formula: a power of probabilities, normalised. torchdistill lacks it."""

import pytest
import torch
from torch import Tensor

from pipeline.config.methods.ttm import TtmConfig
from pipeline.training.methods.ttm import ttm
from tests.pipeline.training.methods.logit_reference import (
    check_equal_networks_cost_nothing,
    check_limits,
    check_step,
    errors,
    kl64,
    labels,
    logits,
    softmax64,
    value_and_slope,
)


def loss(s: Tensor, ts: list[Tensor], y: Tensor, tau: float = 10.0) -> Tensor:
    return ttm(s, torch.softmax(ts[0].float() / tau, dim=1))


def loop(s: Tensor, ts: list[Tensor], y: Tensor, tau: float = 10.0) -> Tensor:
    values = []
    for row, t in zip(s, ts[0], strict=True):
        power = torch.stack([p ** (1 / tau) for p in softmax64(t)])
        values.append(kl64(power / power.sum(), softmax64(row)))
    return torch.stack(values)


@pytest.mark.parametrize(("b", "n"), [(16, 10), (1, 100), (5, 2)])
def test_value_and_gradient_are_those_of_the_formula(b: int, n: int) -> None:
    assert max(errors(loss, loop, logits(b, n, 1), [logits(b, n, 2)], labels(b, n))) < 2e-6


def test_limits() -> None:
    check_limits(loss)
    check_equal_networks_cost_nothing(lambda s, ts, y: loss(s, ts, y, 1.0))


def test_equal_networks_are_not_the_optimum_unless_the_exponent_is_1() -> None:
    """The student has no temperature: it is to be as uncertain as the transformed teacher."""
    s, y = logits(5, 7, 3), labels(5, 7)
    assert loss(s, [s], y).min() > 0.1
    value, slope = value_and_slope(loss, s / 10, [s], y)
    assert value.abs().max() < 1e-5
    assert slope.abs().max() < 1e-5


def test_the_step_computes_the_loss() -> None:
    check_step(TtmConfig, loss)
