"""What the student learns: probability vectors of teachers and synergy (method.md section 3, «Targets»)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def averaged(logits: list[Tensor], weights: list[float] | None, tau: float) -> Tensor:
    """p_avg = softmax(sum_k w_k t_k / tau), (B, N); weights are normalised, None means equal."""
    w = torch.tensor(weights if weights is not None else [1.0] * len(logits), dtype=torch.float64)
    w = w / w.sum()
    total = sum((float(wk) * t.float() for wk, t in zip(w, logits, strict=True)), start=torch.zeros(()))
    return F.softmax(total / tau, dim=1)


def synergy(logits: Tensor, tau_syn: float) -> Tensor:
    """p_syn = softmax(z_syn / tau_syn), (B, N)."""
    return F.softmax(logits.float() / tau_syn, dim=1)


def mixed(target: Tensor, other: Tensor, share: float) -> Tensor:
    """(1 - share) target + share other: probabilities are mixed, never logits."""
    return torch.lerp(target, other, share)


def disagreement(logits: list[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of samples on which the teachers' top-1 is not all equal, and on which all miss the label."""
    top = torch.stack([t.argmax(dim=1) for t in logits])
    return (top != top[0]).any(dim=0).float().mean(), (top != y).all(dim=0).float().mean()
