"""What the student learns, from which samples, and how much each counts (docs/method.md section 3)."""

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


def confidence_weighted(logits: list[Tensor], tau: float) -> Tensor:
    """sum_k w_k softmax(t_k / tau), per sample w_k proportional to max softmax(t_k / tau); (B, N)."""
    p = torch.stack([F.softmax(t.float() / tau, dim=1) for t in logits])
    w = p.amax(dim=2)
    return ((w / w.sum(dim=0))[:, :, None] * p).sum(dim=0)


def averaged_share(known: float, threshold: float, average: float, least: float, most: float) -> float:
    """c of `auto` behind an open gate (docs/method.md section 3).

    Falls linearly from `most` at the gate's threshold to `least` at the averaged teachers' accuracy, clamped; straight
    to `least` if the threshold is not below that accuracy. All accuracies are in the same unit.
    """
    if threshold >= average:
        return least
    share = min(max((known - threshold) / (average - threshold), 0.0), 1.0)
    return most + share * (least - most)


def best_of(p_synergy: Tensor, p_average: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`auto_min`: which of two targets (B, N) has the lower cross-entropy against the label y (B,).

    Returns:
        (B,) bool: whether it is the synergy's, and (B,) bool, the label guard: whether either has the label on top.
    """
    picked = (p_synergy.gather(1, y[:, None]) >= p_average.gather(1, y[:, None])).squeeze(1)
    return picked, (p_synergy.argmax(dim=1) == y) | (p_average.argmax(dim=1) == y)


def synergy(logits: Tensor, tau_syn: float) -> Tensor:
    """p_syn = softmax(z_syn / tau_syn), (B, N)."""
    return F.softmax(logits.float() / tau_syn, dim=1)


def disagreement(logits: list[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of samples on which the teachers' top-1 is not all equal, and on which all miss the label."""
    differ, both_wrong = (disagrees(logits, y, mode).float().mean() for mode in ("pred", "both_wrong"))
    return differ, both_wrong


# samples --------------------------------------------------------------------------------------------------------------


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
