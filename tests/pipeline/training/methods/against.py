"""Losses against references: the same inputs in float32 and, for the reference, in float64; value and gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Loss = Callable[..., Tensor]


class Errors(NamedTuple):
    """Largest differences, relative to the largest number of the reference."""

    value: float
    gradient: float


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graded(loss: Loss, student: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The loss's value and its gradient with respect to the first argument."""
    student = student.detach().clone().requires_grad_()
    value = loss(student, *rest)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def errors(loss: Loss, reference: Loss, *inputs: Tensor) -> Errors:
    """How far a loss is from its reference, which gets float64 copies of the inputs."""
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    return Errors(*(_relative(a, b) for a, b in zip(graded(loss, *inputs), graded(reference, *exact), strict=True)))


def _relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def finite(loss: Loss, *inputs: Any) -> Tensor:
    """The value, after checking that it and its gradient are finite and the value is in float32."""
    value, gradient = graded(loss, *inputs)
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    return value
