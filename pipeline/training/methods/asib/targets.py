"""What the student learns: probability vectors of teachers and synergy (docs/method.md section 3, "Targets")."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training.methods.asib.samples import disagrees


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
    to `least` where the threshold is not below that accuracy. Accuracies in one unit.
    """
    if threshold >= average:
        return least
    share = min(max((known - threshold) / (average - threshold), 0.0), 1.0)
    return most + share * (least - most)


def best_of(p_synergy: Tensor, p_average: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`auto_min`: which of two targets (B, N) has the lower cross-entropy against the label y (B,).

    Returns:
        (B,) bool: whether it is the synergy's, and (B,) bool, the label guard: whether one has the label on top.
    """
    picked = (p_synergy.gather(1, y[:, None]) >= p_average.gather(1, y[:, None])).squeeze(1)
    return picked, (p_synergy.argmax(dim=1) == y) | (p_average.argmax(dim=1) == y)


def synergy(logits: Tensor, tau_syn: float) -> Tensor:
    """p_syn = softmax(z_syn / tau_syn), (B, N)."""
    return F.softmax(logits.float() / tau_syn, dim=1)


def mixed(target: Tensor, other: Tensor, share: float) -> Tensor:
    """(1 - share) target + share other: probabilities are mixed, never logits."""
    return torch.lerp(target, other, share)


def disagreement(logits: list[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of samples on which the teachers' top-1 is not all equal, and on which all miss the label."""
    differ, both_wrong = (disagrees(logits, y, mode).float().mean() for mode in ("pred", "both_wrong"))
    return differ, both_wrong
