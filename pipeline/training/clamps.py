"""Bounds on losses (method.md section 3, «Clamps»)."""

import torch
from torch import Tensor


def ratio_factor(kd: Tensor, ce: Tensor, max_ratio: float) -> Tensor:
    """The detached factor in (0, 1] that brings the weighted KD term down to at most `max_ratio` times the CE term.

    Args:
        kd, ce: the weighted terms of the global batch, scalars >= 0.
    """
    kd, ce = kd.detach(), ce.detach()
    return torch.where(kd > max_ratio * ce, max_ratio * ce / kd.clamp_min(torch.finfo(kd.dtype).tiny), 1.0)


def clamp_loss(loss: Tensor, bound: float, mode: str) -> Tensor:
    """`hard`: min(L, bound). `soft`: L up to the bound, beyond it bound + log(1 + L - bound): the gradient stays."""
    if mode == "hard":
        return loss.clamp_max(bound)
    return torch.where(loss <= bound, loss, bound + torch.log1p((loss - bound).clamp_min(0.0)))
