"""Which samples are distilled, and how much: weights and the sample gate (docs/method.md section 3)."""

import math

import torch
from torch import Tensor


def entropy(p: Tensor) -> Tensor:
    """H(p) in nats, (B,) from probability vectors (B, N); 0 log 0 counts as 0."""
    return -torch.xlogy(p.float(), p.float()).sum(dim=1)


def uncertainty_weight(p: Tensor, u: float) -> Tensor:
    """1 - u H(p) / log N, (B,): the less certain a target (at temperature 1), the less it counts.

    Args:
        p: (B, N), N >= 2.
        u: in [0, 1].
    """
    return 1.0 - u * entropy(p) / math.log(p.shape[1])


def disagrees(logits: list[Tensor], y: Tensor, mode: str) -> Tensor:
    """(B,) bool. `pred`: the teachers' top-1 is not all equal; `both_wrong`: every teacher misses the label."""
    top = torch.stack([t.argmax(dim=1) for t in logits])
    return (top != y).all(dim=0) if mode == "both_wrong" else (top != top[0]).any(dim=0)


def disagreement_weight(logits: list[Tensor], y: Tensor, mode: str, high: float, low: float) -> Tensor:
    """`high` where the teachers disagree, else `low`; (B,)."""
    return torch.where(disagrees(logits, y, mode), high, low)


def gate_size(candidates: int, batch: int, min_ratio: float, max_ratio: float) -> int:
    """How many of a global batch are distilled: the candidates, within min_ratio B (rounded up) and max_ratio B."""
    rounding = 1e-9 * batch  # 0.07 * 100 is 7.000000000000001
    least = math.ceil(min_ratio * batch - rounding)
    most = max(least, math.floor(max_ratio * batch + rounding))
    return min(max(candidates, least), most)


def select(confidence: Tensor, threshold: float, min_ratio: float, max_ratio: float) -> Tensor:
    """Rows (n,), ascending, of the samples that the student is least sure of.

    Samples whose confidence is below `threshold`, least confident first, at least `min_ratio` and at most `max_ratio`
    of the batch; ties go to the earlier row, so that all processes choose alike.

    Args:
        confidence: max softmax of the student, (B,), of the global batch.
    """
    order = torch.argsort(confidence, stable=True)
    below = int((confidence < threshold).sum())
    return order[: gate_size(below, len(confidence), min_ratio, max_ratio)].sort().values
