"""What the student learns, from which samples, and how much each counts (docs/method.md section 3)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
