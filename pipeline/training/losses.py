"""Loss functions: pure, one value for each sample, computed in float32 whatever the autocast type (docs/method.md
sections 1 to 3).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy (B,) of logits (B, N), with torch's label smoothing: (1 - eps) on the label plus eps / N on all."""
    return F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing, reduction="none")


def kl_to(logits: Tensor, target: Tensor, tau: float) -> Tensor:
    """KD(a <- p; tau) = tau^2 KL(p || softmax(a / tau)) per sample (Hinton et al. 2015; docs/method.md, notation).

    Args:
        logits: (B, N), the prediction `a` that is trained.
        target: (B, N), the probability vector `p`; rows sum to 1.

    Returns:
        (B,). 0 log 0 counts as 0, so one-hot targets are fine.
    """
    log_q = F.log_softmax(logits.float() / tau, dim=1)
    p = target.float()
    return tau**2 * (torch.xlogy(p, p) - p * log_q).sum(dim=1)


def kd(student_logits: Tensor, target_logits: Tensor, tau: float) -> Tensor:
    """Distillation from logits: tau^2 KL(softmax(t / tau) || softmax(s / tau)) (Hinton et al. 2015).

    (B,) from logits (B, N); those of the target are held fixed.
    """
    return kl_to(student_logits, F.softmax(target_logits.detach().float() / tau, dim=1), tau)


def softened(logits: Sequence[Tensor], tau: float) -> Tensor:
    """softmax(t_k / tau) of each of K teachers, (B, K, N) from K logits (B, N)."""
    return torch.stack([F.softmax(t.float() / tau, dim=1) for t in logits], dim=1)


def kl_to_each(logits: Tensor, targets: Tensor, tau: float) -> Tensor:
    """`kl_to` for each of K teachers, (B, K), from logits (B, N) and their probability vectors (B, K, N)."""
    return torch.stack([kl_to(logits, p, tau) for p in targets.unbind(dim=1)], dim=1)


def dkd(logits: Tensor, target: Tensor, y: Tensor, tau: float, alpha: float, beta: float) -> Tensor:
    """Decoupled distillation, tau^2 (alpha TCKD + beta NCKD) per sample (Zhao et al. 2022, eq. 7).

    TCKD is the KL divergence between (label, rest) under target and prediction, NCKD that between their distributions
    over the other classes; with alpha = 1 and beta = 1 - p_y it is `kl_to`.

    Args:
        logits: (B, N), trained; N > 2.
        target: (B, N) probability vectors at temperature tau.
        y: (B,) labels.

    Returns:
        (B,).
    """
    label = F.one_hot(y, logits.shape[1]).bool()
    log_q, p = F.log_softmax(logits.float() / tau, dim=1), target.float()
    log_q_rest = log_q.masked_fill(label, -torch.inf)
    log_q_other = log_q_rest.logsumexp(dim=1)
    p_label, p_rest = p.gather(1, y[:, None]).squeeze(1), p.masked_fill(label, 0.0)
    p_other = p_rest.sum(dim=1)
    log_q_label = log_q.gather(1, y[:, None]).squeeze(1)
    tckd = torch.xlogy(p_label, p_label) - p_label * log_q_label + torch.xlogy(p_other, p_other) - p_other * log_q_other
    among = p_rest / p_other.clamp_min(torch.finfo(p.dtype).tiny)[:, None]
    log_among = (log_q - log_q_other[:, None]).masked_fill(label, 0.0)
    nckd = (torch.xlogy(among, among) - among * log_among).sum(dim=1)
    return tau**2 * (alpha * tckd + beta * nckd)


def standardised(logits: Tensor) -> Tensor:
    """z = (x - mean) / (std + 1e-7) of each sample, with the unbiased deviation, (B, N) (Sun et al. 2024, eq. 10)."""
    x = logits.float()
    return (x - x.mean(dim=1, keepdim=True)) / (x.std(dim=1, keepdim=True) + 1e-7)


def feature_distance(feature: Tensor, mu: Tensor, beta: float, clip: float | None) -> Tensor:
    """sum_d huber(feature - mu) per sample, bounded by `clip`; (B,) from (B, D) (docs/method.md section 3).

    huber(x) = x^2 / (2 beta) for |x| < beta, else |x| - beta / 2 (torch's smooth L1).
    """
    distance = F.smooth_l1_loss(feature.float(), mu.float(), reduction="none", beta=beta).sum(dim=1)
    return distance if clip is None else distance.clamp_max(clip)


def normalised(feature: Tensor, norm: str) -> Tensor:
    """The feature as it is (`none`) or at unit length (`l2`)."""
    return F.normalize(feature.float(), dim=1) if norm == "l2" else feature.float()


def ib_kl(mu: Tensor, logvar: Tensor, min_std: float = 0.0) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, I)) = 1/2 sum_d (mu^2 + sigma^2 - 1 - log sigma^2), (B,) (Alemi et al. 2017).

    Args:
        mu, logvar: (B, D).
        min_std: floor of sigma = max(exp(logvar / 2), min_std), as in the sample z (docs/method.md section 1).
    """
    mu, logvar = mu.float(), logvar.float()
    if min_std > 0:
        logvar = logvar.clamp_min(2 * math.log(min_std))
    return 0.5 * (mu.square() + torch.expm1(logvar) - logvar).sum(dim=-1)


def certainty_weights(logvar: Tensor, min_cw: float, max_cw: float) -> Tensor:
    """cw = sg(clamp(mean_d exp(-logvar), min_cw, max_cw)), (B,) from (B, D) (docs/method.md section 3)."""
    return torch.exp(-logvar.detach().float()).mean(dim=-1).clamp(min_cw, max_cw)


def mean_square(parameters: Sequence[Tensor]) -> Tensor:
    """R: the mean over tensors of each tensor's mean square; 0 without tensors (docs/method.md section 3)."""
    if len(parameters) == 0:
        return torch.zeros(())
    return torch.stack([p.float().square().mean() for p in parameters]).mean()


# bounds (docs/method.md section 3, "Clamps") --------------------------------------------------------------------------


def ratio_factor(kd: Tensor, ce: Tensor, max_ratio: float) -> Tensor:
    """The detached factor in (0, 1] that brings the weighted KD term down to at most `max_ratio` times the CE term.

    Args:
        kd, ce: the weighted terms of the global batch, scalars >= 0.
    """
    kd, ce = kd.detach(), ce.detach()
    return torch.where(kd > max_ratio * ce, max_ratio * ce / kd.clamp_min(torch.finfo(kd.dtype).tiny), 1.0)


def clamp_loss(loss: Tensor, bound: float, mode: str, overall: Tensor) -> Tensor:
    """`hard`: min(L, bound). `soft`: L up to the bound, beyond it bound + log(1 + L - bound): the gradient stays.

    Args:
        loss: this process's loss.
        overall: the detached loss of the global batch, by which the bound acts.
    """
    excess = (overall - bound).clamp_min(0.0)
    if mode == "hard":
        slope, value = torch.zeros_like(overall), torch.full_like(overall, bound)
    else:
        slope, value = 1.0 / (1.0 + excess), bound + torch.log1p(excess)
    # the line through (overall, value) with the clamp's slope: its gradient is that of the clamp of the global loss
    return torch.where(overall > bound, value + slope * (loss - overall), loss)
