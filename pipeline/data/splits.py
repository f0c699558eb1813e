"""Which training images are held out for validation.

Fixed by the data and the split seed alone, never by the run's seed: all runs of a study hold out the same images.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError


class Split(NamedTuple):
    """Sorted int64 indices into the training images; together they are all of them, each once."""

    train: Tensor
    val: Tensor


def split(labels: Tensor, fraction: float, digest: str, seed: int) -> Split:
    """A stratified split of training images with `labels` (N,), holding out round(fraction·N) of them.

    Every class gives its share rounded down, and the classes with the largest remainders one image more. The draw
    depends on `digest` (ImageData.digest) and `seed` (dataset.split_seed) only. `fraction` 0 holds out nothing.
    Raises UserError if nothing would be held out, or a class would have no training image left.
    """
    everything = torch.arange(len(labels))
    if fraction == 0:
        return Split(everything, everything[:0])
    values = labels.numpy()
    classes, sizes = np.unique(values, return_counts=True)
    held_out = _shares(sizes, fraction)
    if held_out.sum() == 0:
        raise UserError(
            f"dataset.val_fraction={fraction} of {len(values)} training images holds out none; raise it, or set it to 0"
        )
    if (held_out >= sizes).any():
        name = classes[np.argmax(held_out >= sizes)]
        raise UserError(
            f"dataset.val_fraction={fraction} leaves class {name} without training images "
            f"({sizes.min()} in the smallest class); lower it"
        )
    keys = _keys(len(values), digest, seed)
    is_val = np.zeros(len(values), dtype=bool)
    for label, count in zip(classes, held_out, strict=True):
        members = np.flatnonzero(values == label)
        is_val[members[np.argsort(keys[members], kind="stable")[:count]]] = True
    chosen = torch.from_numpy(is_val)
    return Split(everything[~chosen], everything[chosen])


def _shares(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Largest-remainder rounding of fraction·sizes to integers whose sum is round(fraction·sum)."""
    exact = fraction * sizes
    shares = np.floor(exact).astype(np.int64)
    left = max(round(fraction * int(sizes.sum())) - int(shares.sum()), 0)
    shares[np.argsort(shares - exact, kind="stable")[:left]] += 1
    return shares


def _keys(count: int, digest: str, seed: int) -> np.ndarray:
    """One random number per image. Raw PCG64 output, because numpy guarantees that stream forever (and no other)."""
    state = int.from_bytes(hashlib.sha256(f"validation split {seed} of {digest}".encode()).digest(), "big")
    return np.random.PCG64(state).random_raw(count)
