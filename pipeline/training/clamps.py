"""Bounds on losses (docs/method.md section 3, "Clamps")."""

import torch
from torch import Tensor


def ratio_factor(kd: Tensor, ce: Tensor, max_ratio: float) -> Tensor:
    """The detached factor in (0, 1] that brings the weighted KD term down to at most `max_ratio` times the CE term.

    Args:
        kd, ce: the weighted terms of the global batch, scalars >= 0.
    """
    kd, ce = kd.detach(), ce.detach()
    return torch.where(kd > max_ratio * ce, max_ratio * ce / kd.clamp_min(torch.finfo(kd.dtype).tiny), 1.0)


def clamp_loss(loss: Tensor, bound: float, mode: str, overall: Tensor | None = None) -> Tensor:
    """`hard`: min(L, bound). `soft`: L up to the bound, beyond it bound + log(1 + L - bound): the gradient stays.

    Args:
        loss: this process's loss.
        overall: the detached loss of the global batch, by which the bound acts; None: `loss` is it.
    """
    at = loss.detach() if overall is None else overall
    beyond = at > bound
    excess = (at - bound).clamp_min(0.0)
    if mode == "hard":
        slope, value = torch.zeros_like(at), torch.full_like(at, bound)
    else:
        slope, value = 1.0 / (1.0 + excess), bound + torch.log1p(excess)
    # the line through (at, value) with the clamp's slope: its gradient is that of the clamp of the global loss
    return torch.where(beyond, value + slope * (loss - at), loss)
