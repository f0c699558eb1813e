"""Stacking (Breiman 1996): distillation from one convex combination of K teachers' logits, fitted on held-out images.

The weights minimise the mean of -log softmax(sum_k w_k t_k)_y, which is convex in w. (Least squares against labels
would depend on the scale of the logits, which one-hot labels do not have.) The loss is `losses.kd` to sum_k w_k t_k.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features import Features
from pipeline.config.methods.stack import StackConfig
from pipeline.data.batches import Batch
from pipeline.training import distributed, losses
from pipeline.training.evaluation import outputs
from pipeline.training.methods.simplex import on_simplex
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, Setup, StudentStep

logger = logging.getLogger("asib")
AT_ONCE = 4096
"""Images of which float64 copies are held while the weights are fitted."""


def combined(logits: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_k w_k t_k, (B, N) float32, from K logits (B, N) and weights (K,)."""
    return torch.einsum("k,kbn->bn", weights.float(), torch.stack([t.float() for t in logits]))


def nll(logits: Sequence[Tensor], y: Tensor, w: Tensor) -> tuple[float, Tensor]:
    """Mean of -log softmax(sum_k w_k t_k)_y over n images, and its gradient (K,) on w, float64."""
    value, slope = 0.0, torch.zeros_like(w)
    for *some, labels in zip(*(t.split(AT_ONCE) for t in logits), y.split(AT_ONCE), strict=True):
        t = torch.stack(some).double()
        log_p = F.log_softmax(torch.einsum("k,kbn->bn", w, t), dim=1)
        value -= float(log_p.gather(1, labels[:, None]).sum())
        excess = log_p.exp() - F.one_hot(labels, t.shape[2])
        slope += torch.einsum("bn,kbn->k", excess, t)
    return value / len(y), slope / len(y)


def fitted(logits: Sequence[Tensor], y: Tensor) -> Tensor:
    """The weights (K,), float64, of K teachers' logits (n, N) for labels y (n,): likeliest on the simplex.

    Of several solutions the one with the smallest norm, so that identical teachers share equally.
    """

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = nll(logits, y, torch.from_numpy(w).to(y.device))
        return value, slope.cpu().numpy()

    return on_simplex(objective, len(logits))


class Combination(nn.Module):
    """The fitted weights, part of the checkpoint; not numbers until they are fitted."""

    weights: Tensor

    def __init__(self, k: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weights", torch.full((k,), torch.nan, device=device))


class Stack(StudentStep):
    """Lesson: `p` (n, N), softmax(sum_k w_k t_k / tau)."""

    method: StackConfig

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._held_out = setup.data.eval
        self._combination = (Combination(len(setup.teachers), setup.device),)
        (self.own["combination"],) = self._combination
        self._ready = False

    def _weights(self) -> Tensor:
        """The weights, fitted unless a checkpoint had them; those of the first process in all."""
        (combination,) = self._combination
        if not self._ready and combination.weights.isnan().any():
            y = self._held_out.labels
            logits = [outputs(t, self._held_out, f"teacher {k}").logits for k, t in enumerate(self._teachers)]
            found = distributed.first_process_says(fitted(logits, y))
            combination.weights.copy_(found)
            equal = torch.full_like(found, 1 / len(found))
            logger.info(
                "stack: teachers weigh %s; loss on %d held-out images %.4f, with equal weights %.4f",
                ", ".join(f"{w:.3f}" for w in found.tolist()), len(y),
                *(nll(logits, y, w.to(y.device))[0] for w in (found, equal)),
            )  # fmt: skip
        self._ready = True
        return combination.weights

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        target = self.compared(combined([s.logits for s in seen], self._weights()))
        return {"p": F.softmax(target / self.method.tau, dim=1)}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        self.weighed = self._combination[0].weights
        return {"stack": losses.kl_to(self.compared(student.logits), lesson["p"], self.method.tau)}
