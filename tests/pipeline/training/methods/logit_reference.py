"""What the tests of losses on logits share: float64 arithmetic one sample at a time, comparison, limits."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from models.features import Features
from pipeline.config.methods.base import MethodConfig
from pipeline.data.batches import Batch
from pipeline.training import losses
from pipeline.training.objective import Moment
from pipeline.training.rng import Streams
from pipeline.training.step import Setup
from tests.pipeline.training.builders import CLASSES, CPU, net

Loss = Callable[[Tensor, list[Tensor], Tensor], Tensor]
"""(B,) or () from the student's logits (B, N), K teachers' (B, N), labels (B,)."""


def logits(b: int, n: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn((b, n), generator=torch.Generator().manual_seed(seed))


def labels(b: int, n: int) -> Tensor:
    return (7 * torch.arange(b) + 1) % n


def softmax64(row: Tensor, tau: float = 1.0) -> Tensor:
    """softmax(row / tau) of one sample in float64, from exponentials."""
    e = torch.exp((row.double() - row.double().max().detach()) / tau)
    return e / e.sum()


def kl64(p: Tensor, q: Tensor) -> Tensor:
    """sum_j p_j log(p_j / q_j), one class at a time."""
    return sum((a * torch.log(a / b) for a, b in zip(p, q, strict=True) if a > 0), start=torch.zeros(()))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest deviation relative to the largest entry."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def errors(loss: Loss, reference: Loss, s: Tensor, ts: Sequence[Tensor], y: Tensor) -> tuple[float, float]:
    """Relative errors of a loss's value, and of the gradient of its sum on the student's logits.

    Args:
        reference: the same from float64 logits.
    """
    a, b = s.clone().requires_grad_(), s.double().requires_grad_()
    found, expected = loss(a, list(ts), y), reference(b, [t.double() for t in ts], y)
    assert found.shape == expected.shape
    (slope,) = torch.autograd.grad(found.sum(), a)
    (right,) = torch.autograd.grad(expected.sum(), b)
    return relative_error(found.detach(), expected.detach()), relative_error(slope, right)


def value_and_slope(loss: Loss, s: Tensor, ts: Sequence[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, float32, and the gradient of its sum on the student's logits."""
    s = s.clone().requires_grad_()
    found = loss(s, list(ts), y)
    assert found.dtype == torch.float32
    (slope,) = torch.autograd.grad(found.sum(), s)
    return found.detach(), slope


def check_limits(loss: Loss, k: int = 1, least_classes: int = 2) -> None:
    """One sample, few classes, half precision, and logits up to 1e4 in size: all finite, with finite gradient."""
    for b, n in ((1, 5), (6, least_classes), (1, least_classes)):
        ts, y = [logits(b, n, 10 + i) for i in range(k)], labels(b, n)
        for part in value_and_slope(loss, logits(b, n, 1), ts, y):
            assert torch.isfinite(part).all()
    s, ts, y = logits(4, 6, 2), [logits(4, 6, 20 + i) for i in range(k)], labels(4, 6)
    for dtype in (torch.float16, torch.bfloat16):
        low, low_ts = s.to(dtype), [t.to(dtype) for t in ts]
        assert torch.equal(loss(low, low_ts, y), loss(low.float(), [t.float() for t in low_ts], y))
    assert torch.isfinite(loss((1e4 * s.sign()).half(), [(-1e4 * s.sign()).half()] * k, y)).all()
    for size in (1e3, 1e4):
        signs = [torch.cat([size * x.sign(), size / 3 * x]) for x in (s, *ts)]
        for part in value_and_slope(loss, signs[0], signs[1:], torch.cat([y, y])):
            assert torch.isfinite(part).all()
        for part in value_and_slope(loss, signs[0], [-signs[0]] * k, torch.cat([y, y])):
            assert torch.isfinite(part).all()


def check_equal_networks_cost_nothing(loss: Loss, k: int = 1, rounding: float = 1e-5) -> None:
    """Neither value nor gradient where student and teachers agree."""
    for b, n in ((5, 7), (1, 7), (5, 3)):
        s = logits(b, n, 3)
        value, slope = value_and_slope(loss, s, [s.clone() for _ in range(k)], labels(b, n))
        assert value.abs().max() < rounding
        assert slope.abs().max() < rounding


# steps ----------------------------------------------------------------------------------------------------------------


def step_of(settings: MethodConfig, k: int = 1, classes: int = CLASSES, data: Any = None) -> Any:
    """A method's step for K teachers, as a run makes it from its settings."""
    module, _, name = settings.step.partition(":")
    nets = [net(5, 100 + i, classes=classes) for i in range(k)]
    setup = Setup(net(6, 0, classes=classes), nets, settings, Streams(0), CPU, classes, data, [], [[] for _ in nets])
    return getattr(import_module(module), name)(setup)


def terms_of(step: Any, s: Tensor, ts: Sequence[Tensor], y: Tensor) -> dict[str, Tensor]:
    """The step's terms for one batch of a single process."""

    def features(x: Tensor) -> Features:
        return Features(x, torch.zeros(len(x), 1), torch.zeros(len(x), 1, 1, 1), None)

    one, n = torch.ones(()), len(y)
    batch = Batch(torch.zeros(n, 1), torch.zeros(n, 1), y, y, one, torch.arange(n), slice(0, n), n, None, None)
    with torch.no_grad():
        lesson = step.lesson([features(t) for t in ts], y)
    assert all(len(part) == n for part in lesson.values())
    return step.terms(features(s), lesson, batch, Moment("b", 0, 0))


def check_step(settings: Callable[..., MethodConfig], loss: Loss, k: int = 1) -> None:
    """The step's weighted terms are the pure loss of the logits; standardised ones if the settings say so.

    Args:
        settings: makes the method's settings with the given keys.
        loss: with the settings' constants.
    """
    s, ts, y = logits(6, CLASSES, 1), [logits(6, CLASSES, 2 + i) for i in range(k)], labels(6, CLASSES)
    for prepare in (losses.standardised, Tensor.float):
        step = step_of(settings(standardise=prepare is losses.standardised), k)
        found = value_and_slope(partial(_weighted, step), s, ts, y)
        expected = value_and_slope(partial(_prepared, loss, prepare), s, ts, y)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, step.method.kd_alpha * b)


def _weighted(step: Any, s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    terms, weights = terms_of(step, s, ts, y), step.term_weights()
    assert terms.keys() == weights.keys()
    return torch.stack([weights[name] * term.mean() for name, term in terms.items()]).sum()


def _prepared(loss: Loss, prepare: Callable[[Tensor], Tensor], s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    return loss(prepare(s), [prepare(t) for t in ts], y).mean()
