"""Which classes each of several teachers is taught: some that all are, and the others divided among them."""

import numpy as np


def subsets(classes: int, teachers: int, overlap: float, seed: int) -> list[tuple[int, ...]]:
    """The classes of each teacher, ascending.

    In an order that depends on `seed` and `classes` only, the first round(overlap · classes) are common to all, and
    each teacher has besides a share of the rest; shares differ by at most one class, and earlier ones are larger.

    Example:
        >>> subsets(classes=5, teachers=2, overlap=1, seed=0)
        [(0, 1, 2, 3, 4), (0, 1, 2, 3, 4)]
    """
    keys = np.random.PCG64(seed).random_raw(classes)  # a stream that numpy guarantees forever
    order = np.argsort(keys, kind="stable")
    common = round(overlap * classes)
    shares = np.array_split(order[common:], teachers)
    return [tuple(sorted(int(number) for number in (*order[:common], *share))) for share in shares]
