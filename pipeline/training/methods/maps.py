"""What several methods do to feature maps (B, C, h, w): one size, attention, unit length, distance. All in float32."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NOTHING = 1e-12
"""Rows and maps whose largest entry is not above this count as zero: torch's own bound in `F.normalize`."""


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (B, ., h, w) at one size: the larger is average-pooled to the smaller, side by side."""
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    return pooled(a, size), pooled(b, size)


def pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (B, C, ., .), average-pooled to (B, C, *size) where it has another size."""
    x = x.float()
    return x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size)


def unit(x: Tensor) -> Tensor:
    """Rows (..., n) at unit L2 length; rows of zeros stay zero, and their gradient stays finite.

    Each row is first divided by its largest entry, which the result does not depend on: no square overflows, and small
    rows reach unit length too.
    """
    x = scaled(x.float(), (-1,))
    length = x.norm(dim=-1, keepdim=True)
    return x / torch.where(length > NOTHING, length, 1.0)


def scaled(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x over its largest magnitude along `dims`, which is held fixed: for functions that no factor changes."""
    fixed = x.detach()
    largest = torch.maximum(fixed.amax(dims, keepdim=True), -fixed.amin(dims, keepdim=True))  # without a copy of x
    return x / torch.where(largest > NOTHING, largest, 1.0)


def attention(x: Tensor, p: int) -> Tensor:
    """The attention map mean_c |F|^p of (B, C, h, w), flattened, at unit length: (B, h·w) (Zagoruyko et al. 2017)."""
    x = scaled(x.float(), (1, 2, 3))
    return unit((x if p % 2 == 0 else x.abs()).pow(p).mean(dim=1).flatten(1))


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """mean_chw (a − b)², (B,) from two maps (B, C, h, w)."""
    return (a.float() - b.float()).square().mean(dim=(1, 2, 3))


def to_lesson(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Maps of stages as parts of a lesson."""
    return {f"stage_{i}": x for i, x in enumerate(maps)}


def of_lesson(lesson: dict[str, Tensor]) -> list[Tensor]:
    """The maps that `to_lesson` stored, first to last."""
    return [lesson[name] for name in sorted(lesson) if name.startswith("stage_")]
