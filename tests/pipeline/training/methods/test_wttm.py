"""Weighted transformed teacher matching against the formula, and how mixed images are taught. torchdistill lacks it."""

import pytest
import torch
from torch import Tensor

from pipeline.config.methods.wttm import WttmConfig
from pipeline.training.methods.wttm import powered, wttm
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


def loss(s: Tensor, ts: list[Tensor], y: Tensor, gamma: float = 0.2) -> Tensor:
    return wttm(s, powered(ts[0], gamma))


def loop(s: Tensor, ts: list[Tensor], y: Tensor, gamma: float = 0.2) -> Tensor:
    values = []
    for row, t in zip(s, ts[0], strict=True):
        power = torch.stack([p**gamma for p in softmax64(t)])
        values.append(power.sum() * kl64(power / power.sum(), softmax64(row)))
    return torch.stack(values)


@pytest.mark.parametrize(("b", "n"), [(16, 10), (1, 100), (5, 2)])
def test_value_and_gradient_are_those_of_the_formula(b: int, n: int) -> None:
    assert max(errors(loss, loop, logits(b, n, 1), [logits(b, n, 2)], labels(b, n))) < 2e-6


def test_limits() -> None:
    check_limits(loss)
    check_equal_networks_cost_nothing(lambda s, ts, y: loss(s, ts, y, 1.0))  # weights are 1


def test_the_weight_is_1_for_a_certain_teacher_and_largest_for_a_uniform_one() -> None:
    certain, uniform = torch.tensor([[1e4, 0.0, 0.0, 0.0]]), torch.zeros(1, 4)
    assert powered(certain, 0.2).sum() == 1
    assert powered(uniform, 0.2).sum().item() == pytest.approx(4**0.8)


def test_a_sample_without_a_lesson_counts_nothing() -> None:
    for part in value_and_slope(lambda s, ts, y: wttm(s, torch.zeros(2, 7)), logits(2, 7, 1), [], labels(2, 7)):
        assert torch.equal(part, torch.zeros_like(part))


def test_a_mixture_of_two_lessons_pulls_as_the_mixture_of_their_losses() -> None:
    s, a, b, y = logits(5, 7, 1), logits(5, 7, 2), logits(5, 7, 3), labels(5, 7)

    def of_mixture(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
        return wttm(s, 0.3 * powered(a, 0.2) + 0.7 * powered(b, 0.2))

    def mixture(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
        return 0.3 * loss(s, [a], y) + 0.7 * loss(s, [b], y)

    torch.testing.assert_close(value_and_slope(of_mixture, s, [], y)[1], value_and_slope(mixture, s, [], y)[1])


def test_the_step_computes_the_loss() -> None:
    check_step(WttmConfig, loss)
