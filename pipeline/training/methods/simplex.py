"""The least value of a convex function of weights: non-negative, bounded, with sum 1."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

TIE = 1e-6
"""Weight of |w|^2 / 2, which picks the smallest of several minima: objectives are of the order of 1."""

Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""Value and gradient (K,) at weights (K,)."""


def on_simplex(objective: Objective, k: int, most: float = 1.0) -> Tensor:
    """argmin f(w) over the K weights w_k in [0, most] with sum 1: (K,) float64, on the CPU.

    Of several minima the one with the smallest norm: equal teachers get equal weights. `most` counts as 1 / K if that
    is more, so that there is a solution.
    """

    def tied(w: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = objective(w)
        return value + TIE / 2 * float(w @ w), slope + TIE * w

    found = minimize(
        tied,
        np.full(k, 1 / k),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, max(most, 1 / k))] * k,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(k)},
        options={"ftol": 1e-12, "maxiter": 200},
    )
    w = torch.from_numpy(found.x).clamp_min(0.0)
    return w / w.sum()
