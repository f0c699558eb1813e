"""What several teachers say together of samples, and which samples are distilled (docs/method.md section 3)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def averaged(logits: list[Tensor], weights: list[float] | None, tau: float) -> Tensor:
    """p_avg = softmax(sum_k w_k t_k / tau), (B, N); weights are normalised, None means equal."""
    w = torch.tensor(weights if weights is not None else [1.0] * len(logits), dtype=torch.float64)
    w = w / w.sum()
    total = sum((float(wk) * t.float() for wk, t in zip(w, logits, strict=True)), start=torch.zeros(()))
    return F.softmax(total / tau, dim=1)


def disagreement(logits: list[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of samples on which the teachers' top-1 is not all equal, and on which all miss the label."""
    differ, both_wrong = (disagrees(logits, y, mode).float().mean() for mode in ("pred", "both_wrong"))
    return differ, both_wrong


def disagrees(logits: list[Tensor], y: Tensor, mode: str) -> Tensor:
    """(B,) bool. `pred`: the teachers' top-1 is not all equal; `both_wrong`: every teacher misses the label."""
    top = torch.stack([t.argmax(dim=1) for t in logits])
    return (top != y).all(dim=0) if mode == "both_wrong" else (top != top[0]).any(dim=0)


def gate_size(candidates: int, batch: int, min_ratio: float, max_ratio: float) -> int:
    """How many of a global batch are distilled: the candidates, within min_ratio B (rounded up) and max_ratio B."""
    rounding = 1e-9 * batch  # 0.07 * 100 is 7.000000000000001
    least = math.ceil(min_ratio * batch - rounding)
    most = max(least, math.floor(max_ratio * batch + rounding))
    return min(max(candidates, least), most)


def select(confidence: Tensor, threshold: float, min_ratio: float, max_ratio: float) -> Tensor:
    """Rows (n,), ascending, of the samples that the student is least sure of.

    Samples whose confidence is below `threshold`, least confident first, at least `min_ratio` and at most `max_ratio`
    of the batch; ties go to the earlier row, so that all processes choose the same.

    Args:
        confidence: max softmax of the student, (B,), of the global batch.
    """
    order = torch.argsort(confidence, stable=True)
    below = int((confidence < threshold).sum())
    return order[: gate_size(below, len(confidence), min_ratio, max_ratio)].sort().values
