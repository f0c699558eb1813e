"""Decoupled distillation against the formula, one sample and one class at a time. torchdistill does not have it."""

import pytest
import torch
from torch import Tensor

from pipeline.config.methods.dkd import DkdConfig
from pipeline.errors import UserError
from pipeline.training import losses
from tests.pipeline.training.methods.logit_reference import (
    check_equal_networks_cost_nothing,
    check_limits,
    check_step,
    errors,
    kl64,
    labels,
    logits,
    softmax64,
    step_of,
)

ALPHA, BETA, TAU = 1.0, 8.0, 4.0


def loss(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    return losses.dkd(s, torch.softmax(ts[0].float() / TAU, dim=1), y, TAU, ALPHA, BETA)


def loop(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    values = []
    for row, t, label in zip(s, ts[0], y.tolist(), strict=True):
        others = [j for j in range(len(row)) if j != label]
        q, p = softmax64(row, TAU), softmax64(t, TAU)
        tckd = kl64(torch.stack([p[label], p[others].sum()]), torch.stack([q[label], q[others].sum()]))
        nckd = kl64(softmax64(t[others], TAU), softmax64(row[others], TAU))
        values.append(TAU**2 * (ALPHA * tckd + BETA * nckd))
    return torch.stack(values)


@pytest.mark.parametrize(("b", "n"), [(16, 10), (1, 100), (5, 3)])
def test_value_and_gradient_are_those_of_the_formula(b: int, n: int) -> None:
    assert max(errors(loss, loop, logits(b, n, 1), [logits(b, n, 2)], labels(b, n))) < 5e-6


def test_limits() -> None:
    check_limits(loss, least_classes=3)
    check_equal_networks_cost_nothing(loss, rounding=5e-5)  # beta tau^2 is 128


def test_the_step_computes_the_loss() -> None:
    check_step(DkdConfig, loss)


def test_two_classes_are_refused() -> None:
    with pytest.raises(UserError, match="2 classes; use kd"):
        step_of(DkdConfig(), classes=2)


def test_terms_that_are_both_off_are_refused() -> None:
    with pytest.raises(ValueError, match="distil nothing; raise one"):
        DkdConfig(alpha=0, beta=0)
