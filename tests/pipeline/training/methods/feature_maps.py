"""What the tests of methods on feature maps share: maps, loops over plain float64 numbers, numeric derivatives."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Map = list[list[list[float]]]
"""One sample: channels, rows, columns."""
SIZES = [
    ((3, 4, 4), (5, 4, 4)),
    ((3, 4, 4), (2, 2, 2)),
    ((3, 2, 3), (4, 5, 4)),
    ((2, 5, 3), (2, 3, 5)),
    ((1, 1, 1), (2, 3, 3)),
]
"""Shapes of student and teacher: the same size, larger, smaller, and one side each."""


def maps(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Maps after ReLU: half of their entries are zero."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu()


def positive(*shape: int, seed: int = 0) -> Tensor:
    """Maps without zeros."""
    return maps(*shape, seed=seed) + 0.1 + 0.1 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def pool(x: Map, h: int, w: int) -> Map:
    """Average-pooled to h × w; windows overlap where the sides do not divide."""

    def window(i: int, small: int, large: int) -> range:
        return range(i * large // small, -(-(i + 1) * large // small))

    def mean(channel: list[list[float]], i: int, j: int) -> float:
        rows, columns = window(i, h, len(channel)), window(j, w, len(channel[0]))
        return sum(channel[a][b] for a in rows for b in columns) / (len(rows) * len(columns))

    return [[[mean(channel, i, j) for j in range(w)] for i in range(h)] for channel in x]


def to_smaller(a: Map, b: Map) -> tuple[Map, Map]:
    h, w = min(len(a[0]), len(b[0])), min(len(a[0][0]), len(b[0][0]))
    return pool(a, h, w), pool(b, h, w)


def flat(x: Any) -> list[float]:
    return [v for item in x for v in flat(item)] if isinstance(x, list) else [x]


def normalise(x: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in x))
    return [v / length if length else 0.0 for v in x]


def attend(x: Map, p: int) -> list[float]:
    """mean_c |F|^p for each place, at unit length."""
    places = range(len(x[0])), range(len(x[0][0]))
    return normalise([sum(abs(c[i][j]) ** p for c in x) / len(x) for i in places[0] for j in places[1]])


def mean_square(a: Any, b: Any) -> float:
    pairs = list(zip(flat(a), flat(b), strict=True))
    return sum((u - v) ** 2 for u, v in pairs) / len(pairs)


def off(ours: Tensor, reference: Any) -> float:
    """The largest difference, over the reference's largest magnitude."""
    expected = torch.as_tensor(reference, dtype=torch.float64).detach()
    largest = float(expected.abs().max())
    return float((ours.detach().double().reshape(expected.shape) - expected).abs().max()) / (largest or 1.0)


def slope(ours: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of the sum of our values by back-propagation."""
    x = x.clone().requires_grad_()
    ours(x).sum().backward()
    assert x.grad is not None
    return x.grad


def differences(loop: Callable[[Any], float | list[float]], x: Tensor, step: float = 1e-5) -> Tensor:
    """The gradient of the sum of a loop's values by central differences in float64."""
    x = x.double()

    def total(at: Tensor) -> float:
        found = loop(at.tolist())
        return math.fsum(found if isinstance(found, list) else [found])

    found = torch.zeros_like(x).flatten()
    for i in range(x.numel()):
        up, down = x.clone(), x.clone()
        up.view(-1)[i] += step
        down.view(-1)[i] -= step
        found[i] = (total(up) - total(down)) / (2 * step)
    return found.reshape(x.shape)
