"""Metrics of the accuracy matrix R: R[t, i] is the accuracy on task i after task t, both counted from 0.

Definitions as in mammoth's utils/metrics.py and, of the average incremental accuracy, PyCIL's (docs/continual.md).
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def average(r: Matrix) -> float:
    """mean_i R[T-1, i], of a matrix (T, T): the accuracy at the end, all tasks counting alike."""
    return float(r[-1].mean())


def forgetting(r: Matrix) -> float:
    """mean_{i < T-1} (max_{i <= t < T-1} R[t, i] - R[T-1, i]) (Chaudhry et al. 2018); 0 for one task."""
    if len(r) == 1:
        return 0.0
    seen = np.where(np.tri(len(r), dtype=bool), r, -np.inf)
    return float((seen[:-1, :-1].max(axis=0) - r[-1, :-1]).mean())


def backward_transfer(r: Matrix) -> float:
    """BWT = mean_{i < T-1} (R[T-1, i] - R[i, i]) (Lopez-Paz and Ranzato 2017); 0 for one task."""
    return float((r[-1, :-1] - np.diag(r)[:-1]).mean()) if len(r) > 1 else 0.0


def forward_transfer(r: Matrix, untrained: NDArray[np.float64]) -> float:
    """FWT = mean_{i > 0} (R[i-1, i] - b_i), b (T,): accuracies before any training; 0 for one task."""
    return float((np.diag(r, 1) - untrained[1:]).mean()) if len(r) > 1 else 0.0


def incremental(seen: NDArray[np.float64]) -> float:
    """The average incremental accuracy: the mean of the accuracies (T,) on all classes seen by the end of each task."""
    return float(seen.mean())
