"""Normalised distillation against the formula, one sample and one class at a time. torchdistill does not have it."""

from functools import partial

import pytest
import torch
from torch import Tensor

from pipeline.config.methods.nkd import NkdConfig
from pipeline.training.methods.nkd import nkd
from tests.pipeline.training.methods.logit_reference import (
    check_limits,
    check_step,
    errors,
    labels,
    logits,
    softmax64,
    value_and_slope,
)


def loss(s: Tensor, ts: list[Tensor], y: Tensor, tau: float = 2.0, gamma: float = 1.5) -> Tensor:
    return nkd(s, ts[0], y, tau, gamma)


def loop(s: Tensor, ts: list[Tensor], y: Tensor, tau: float = 2.0, gamma: float = 1.5) -> Tensor:
    values = []
    for row, t, label in zip(s, ts[0], y.tolist(), strict=True):
        others = [j for j in range(len(row)) if j != label]
        student, teacher = softmax64(row), softmax64(t)
        rest, taught = softmax64(row[others], tau), softmax64(t[others], tau)
        non_target = sum(a * torch.log(b) for a, b in zip(taught, rest, strict=True))
        values.append(-teacher[label] * torch.log(student[label]) - gamma * tau**2 * non_target)
    return torch.stack(values)


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize(("b", "n"), [(16, 10), (1, 100), (5, 3), (5, 2)])
def test_value_and_gradient_are_those_of_the_formula(b: int, n: int, tau: float) -> None:
    def timed(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
        return (loss if s.dtype == torch.float32 else loop)(s, ts, y, tau)

    assert max(errors(timed, timed, logits(b, n, 1), [logits(b, n, 2)], labels(b, n))) < 2e-6


def test_limits() -> None:
    check_limits(loss)


def test_of_equal_networks_only_the_target_class_pulls() -> None:
    """Cross-entropies stay above 0; their gradient is T_y (S - onehot), which the other classes add nothing to."""
    s, y = logits(5, 7, 3), labels(5, 7)
    _, slope = value_and_slope(loss, s, [s.clone()], y)
    q, label = torch.softmax(s, dim=1), torch.nn.functional.one_hot(y, 7)
    torch.testing.assert_close(slope, q.gather(1, y[:, None]) * (q - label), atol=1e-6, rtol=1e-5)


def test_with_two_classes_the_target_class_is_all() -> None:
    s, t, y = logits(5, 2, 1), logits(5, 2, 2), labels(5, 2)
    assert torch.equal(loss(s, [t], y, gamma=1.5), loss(s, [t], y, gamma=0.0))


def test_the_step_computes_the_loss() -> None:
    check_step(partial(NkdConfig, tau=2.0), loss)
