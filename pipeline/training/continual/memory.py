"""The images kept of past tasks: which ones, by three rules. Kept are their numbers in the data set, never copies."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class Memory:
    """What is kept: at most `size` of the `seen` images.

    index: int64 (m,), in the training images. logits: (m, N) float32, the student's of each image when it was kept.
    known: int64 (m,), how many classes had been seen then.
    """

    size: int
    index: Tensor = field(default_factory=_none)
    logits: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    known: Tensor = field(default_factory=_none)
    seen: int = 0


def reservoir(index: Tensor, seen: int, stream: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Algorithm R (Vitter 1985) over a stream: of all images seen so far each is kept with the same probability.

    Args:
        index: (m,), what is kept; seen: of how many.
        stream: (n,), the new images in the order in which they come.
        size: the most that may be kept.

    Returns:
        (m', 2): rows of the old memory and of the stream that are kept, the other being -1; in memory order.
    """
    slots: list[tuple[int, int]] = [(row, -1) for row in range(len(index))]
    draws = torch.rand(len(stream), generator=generator, dtype=torch.float64).tolist()
    for row, draw in enumerate(draws):
        if len(slots) < size:
            slots.append((-1, row))
        elif (place := int(draw * (seen + row + 1))) < size:
            slots[place] = (-1, row)
    old, new = zip(*slots, strict=True) if slots else ((), ())
    return torch.tensor(old, dtype=torch.int64), torch.tensor(new, dtype=torch.int64)


def herded(features: Tensor, count: int) -> Tensor:
    """Rows (count,) of features (n, C) whose running mean stays nearest the mean of all (Welling 2009; iCaRL, alg. 4).

    p_k = argmin_x || mu - (f(x) + sum_{j<k} f(p_j)) / k ||, features of unit length, each row once.
    """
    f = F.normalize(features.double(), dim=1)
    mean, total, left = f.mean(dim=0), torch.zeros_like(f[0]), torch.ones(len(f), dtype=torch.bool, device=f.device)
    chosen: list[int] = []
    for k in range(1, min(count, len(f)) + 1):
        distance = ((mean - (f + total) / k) ** 2).sum(dim=1).masked_fill(~left, torch.inf)
        chosen.append(int(distance.argmin()))
        total, left[chosen[-1]] = total + f[chosen[-1]], False
    return torch.tensor(chosen, dtype=torch.int64)


def quotas(size: int, classes: int) -> list[int]:
    """How many images of each of the classes seen so far, in the order in which they came: as equally as possible."""
    return [size // classes + (k < size % classes) for k in range(classes)]


def balanced(
    labels: Tensor, stream_labels: Tensor, size: int, pick: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Equally many of each class: old classes give up their last images, new ones are picked.

    Args:
        labels: (m,), of what is kept. stream_labels: (n,), of the new images.
        pick: given rows of the stream, of one class, and a number, the rows to keep, the best first.

    Returns:
        As `reservoir`; the rows of each class in the order in which they were picked.
    """
    classes = list(dict.fromkeys([*labels.tolist(), *sorted(set(stream_labels.tolist()))]))
    old: list[Tensor] = []
    new: list[Tensor] = []
    for label, quota in zip(classes, quotas(size, len(classes)), strict=True):
        kept = (labels == label).nonzero()[:, 0][:quota]
        rows = (stream_labels == label).nonzero()[:, 0]
        fresh = pick(rows, quota - len(kept))[: quota - len(kept)] if len(rows) and len(kept) < quota else _none()
        old += [kept, torch.full_like(fresh, -1)]
        new += [torch.full_like(kept, -1), fresh]
    return torch.cat(old), torch.cat(new)


def merged(memory: Memory, old: Tensor, new: Tensor, stream: Tensor, logits: Tensor, known: int) -> Memory:
    """The memory of these rows: of the old one and, where that is -1, of the stream (n,) with its logits (n, N)."""
    rows = torch.where(new >= 0, new, len(stream) + old)

    def of(fresh: Tensor, before: Tensor) -> Tensor:
        return torch.cat([fresh, before.reshape(len(before), *fresh.shape[1:])])[rows]

    numbers = torch.full_like(stream, known)
    kept = of(stream, memory.index), of(logits, memory.logits), of(numbers, memory.known)
    return Memory(memory.size, *kept, seen=memory.seen + len(stream))
