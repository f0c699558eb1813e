"""Entropy-based weights against the formula. torchdistill has no loss for several teachers."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.config.methods.ebkd import EbkdConfig
from pipeline.training import losses
from pipeline.training.methods.ebkd import ebkd, entropy_weights
from tests.pipeline.training.builders import CLASSES
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


def loss(s: Tensor, ts: list[Tensor], y: Tensor, as_published: bool = False) -> Tensor:
    return ebkd(s, losses.softened(ts, TAU), entropy_weights(ts, as_published), TAU)


def loop(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    values, k = [], len(ts)
    for i, row in enumerate(s):
        entropies = [-sum(p * torch.log(p) for p in softmax64(t[i])) for t in ts]
        weights = [(1 - h / sum(entropies)) / (k - 1) if k > 1 else 1.0 for h in entropies]
        kds = [TAU**2 * kl64(softmax64(t[i], TAU), softmax64(row, TAU)) for t in ts]
        values.append(sum(w * kd for w, kd in zip(weights, kds, strict=True)))
    return torch.stack(values)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("b", "n"), [(16, 10), (1, 100), (5, 2)])
def test_value_and_gradient_are_those_of_the_formula(b: int, n: int, k: int) -> None:
    assert max(errors(loss, loop, logits(b, n, 1), [logits(b, n, 2 + i) for i in range(k)], labels(b, n))) < 2e-6


def test_limits() -> None:
    check_limits(loss, k=3)
    check_equal_networks_cost_nothing(loss, k=3)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [0.0, 3.0, 1e4])
def test_weights_sum_to_1_and_the_published_ones_to_k_minus_1_over_k(k: int, scale: float) -> None:
    ts = [logits(6, 9, i, scale) for i in range(k)]
    weights = entropy_weights(ts)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    torch.testing.assert_close(entropy_weights(ts, as_published=True).sum(1), torch.full((6,), (k - 1) / k))


def test_the_published_loss_is_k_minus_1_over_k_of_the_formulas() -> None:
    s, ts, y = logits(6, 9, 1), [logits(6, 9, 2 + i) for i in range(3)], labels(6, 9)
    torch.testing.assert_close(loss(s, ts, y, as_published=True), loss(s, ts, y) * 2 / 3)


def test_a_surer_teacher_weighs_more_and_equally_sure_ones_the_same() -> None:
    t = logits(6, 9, 1)
    weights = entropy_weights([t, t / 4, t.clone()])
    assert (weights[:, 0] > weights[:, 1]).all()
    assert torch.equal(weights[:, 0], weights[:, 2])
    certain = entropy_weights([1e4 * torch.eye(4), -1e4 * torch.eye(4)[[1, 0, 3, 2]] + 2e4 * torch.eye(4)])
    assert torch.equal(certain, torch.full((4, 2), 0.5)), "no entropy anywhere"


def test_one_teacher_is_plain_distillation() -> None:
    s, t = logits(6, 9, 1), logits(6, 9, 2)
    assert torch.equal(loss(s, [t], labels(6, 9)), losses.kd(s, t, TAU))


@pytest.mark.parametrize("as_published", [False, True])
def test_the_step_computes_the_loss(as_published: bool) -> None:
    """Weights come from the teachers' own logits even if standardised ones are compared: those show their certainty."""
    weights = entropy_weights([logits(6, CLASSES, 2 + i) for i in range(3)], as_published)

    def weighted(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
        return ebkd(s, losses.softened(ts, TAU), weights, TAU)

    check_step(partial(EbkdConfig, as_published=as_published), weighted, k=3)


def test_a_single_teacher_cannot_have_the_published_weight_which_is_0() -> None:
    for k, broken in ((1, 1), (2, 0)):
        config = SimpleNamespace(model=SimpleNamespace(teachers=(None,) * k))
        assert len(list(EbkdConfig(as_published=True).rules(config))) == broken
        assert list(EbkdConfig().rules(config)) == []
