"""The mean over teachers against the formula. torchdistill has no loss for several teachers."""

import pytest
import torch
from torch import Tensor

from pipeline.config.methods.aver import AverConfig
from pipeline.training import losses
from pipeline.training.methods.aver import aver
from tests.pipeline.training.methods.logit_reference import (
    check_equal_networks_cost_nothing,
    check_limits,
    check_step,
    errors,
    kl64,
    labels,
    logits,
    softmax64,
)

TAU = 4.0


def loss(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    return aver(s, losses.softened(ts, TAU), TAU)


def loop(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    values = []
    for i, row in enumerate(s):
        values.append(sum(TAU**2 * kl64(softmax64(t[i], TAU), softmax64(row, TAU)) for t in ts) / len(ts))
    return torch.stack(values)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("b", "n"), [(16, 10), (1, 100), (5, 2)])
def test_value_and_gradient_are_those_of_the_formula(b: int, n: int, k: int) -> None:
    assert max(errors(loss, loop, logits(b, n, 1), [logits(b, n, 2 + i) for i in range(k)], labels(b, n))) < 2e-6


def test_limits() -> None:
    check_limits(loss, k=3)
    check_equal_networks_cost_nothing(loss, k=3)


def test_one_teacher_is_plain_distillation() -> None:
    s, t = logits(6, 9, 1), logits(6, 9, 2)
    assert torch.equal(loss(s, [t], labels(6, 9)), losses.kd(s, t, TAU))


def test_it_differs_from_the_average_of_logits() -> None:
    s, a, b = logits(6, 9, 1), logits(6, 9, 2), logits(6, 9, 3)
    assert (loss(s, [a, b], labels(6, 9)) - losses.kd(s, (a + b) / 2, TAU)).abs().min() > 0.01


def test_the_step_computes_the_loss() -> None:
    check_step(AverConfig, loss, k=3)
