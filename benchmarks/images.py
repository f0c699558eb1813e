"""Synthetic data of any size, for benchmarks in which what is learned does not matter."""

from pathlib import Path
from typing import Any

import numpy as np


def write_images(path: Path, count: int) -> Path:
    """Random images of ten classes; 1/10 as many for testing."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, n in (("train", count), ("test", count // 10)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(n) % 10
    np.savez(path, **arrays)
    return path
