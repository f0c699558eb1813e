"""Adaptive ensemble distillation (AE-KD; Du et al. 2020): sum_k w_k KD_k, with the weights w of a batch that minimise
|sum_k w_k g_k|^2 / 2 over w_k in [0, C], sum_k w_k = 1. g_k is the gradient of the batch's KD_k on the student's
logits, all B x N of them; public code takes its mean over the batch, N numbers, in which samples cancel.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.features import Features
from pipeline.config.methods.aekd import AekdConfig
from pipeline.data.batches import Batch
from pipeline.training import distributed, losses
from pipeline.training.methods.simplex import on_simplex
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, StudentStep


def gram(logits: Tensor, targets: Tensor, tau: float) -> Tensor:
    """Inner products g_k . g_l (K, K), float64, over samples and classes, of g_k = tau (softmax(s / tau) - p_k).

    A sample without a lesson, whose p_k is 0, has no gradient.

    Args:
        logits: (B, N), the student's. targets: (B, K, N), the teachers' probability vectors.
    """
    q = F.softmax(logits.detach().double() / tau, dim=1)
    p = targets.double()
    g = tau * (q[:, None] * p.sum(dim=2, keepdim=True) - p)
    return torch.einsum("bkn,bln->kl", g, g)


def common_descent(products: Tensor, most: float) -> Tensor:
    """w (K,), float64, from the `gram` (K, K) on the CPU: smallest combined gradient, no weight above `most`.

    Equal weights if all gradients are 0, or not finite.
    """
    k = len(products)
    scale = products.trace() / k
    if not (torch.isfinite(products).all() and scale > 0):
        return torch.full((k,), 1 / k, dtype=torch.float64)
    scaled = (products / scale).numpy()

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        slope = scaled @ w
        return float(w @ slope) / 2, slope

    return on_simplex(objective, k, most)


def aekd(logits: Tensor, targets: Tensor, weights: Tensor, tau: float) -> Tensor:
    """sum_k w_k KD(s <- p_k; tau), (B,), from logits (B, N), probability vectors (B, K, N) and weights (K,)."""
    return losses.kl_to_each(logits, targets, tau) @ weights.to(logits.device, torch.float32)


class Aekd(StudentStep):
    """Lesson: `p` (n, K, N), softmax(t_k / tau). The weights are those of the global batch, anew for each update."""

    method: AekdConfig

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"p": losses.softened([self.compared(s.logits) for s in seen], self.method.tau)}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        m, s, p = self.method, self.compared(student.logits), lesson["p"]
        weights = common_descent(distributed.total(gram(s, p, m.tau)).cpu(), m.tolerance)
        self.weighed = weights
        return {"aekd": aekd(s, p, weights, m.tau)}
