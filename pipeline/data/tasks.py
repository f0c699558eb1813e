"""Which classes come in which task of continual learning (docs/continual.md)."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from pipeline.config.continual import ContinualConfig
from pipeline.errors import UserError

PUBLISHED_SEED = 1993
"""Of the order in iCaRL's, PODNet's and PyCIL's tables: NumPy's legacy generator, whose stream is frozen."""


def class_order(config: ContinualConfig, num_classes: int) -> list[int]:
    """The classes in the order in which they come. Raises UserError: a given order that is not one of these classes."""
    if config.order == "identity":
        return list(range(num_classes))
    if isinstance(config.order, str):
        seed = PUBLISHED_SEED if config.order == "published" else config.order_seed % 2**32
        return [int(c) for c in np.random.RandomState(seed).permutation(num_classes)]
    if len(config.order) != num_classes:
        raise UserError(
            f"continual.order names {len(config.order)} classes, and the data has {num_classes}: name each once"
        )
    return list(config.order)


def class_tasks(config: ContinualConfig, num_classes: int) -> list[tuple[int, ...]]:
    """The classes of each task, in order.

    Raises UserError: the classes cannot be divided so.

    Example:
        >>> class_tasks(ContinualConfig(num_tasks=3, base_classes=4, order="identity"), 8)
        [(0, 1, 2, 3), (4, 5), (6, 7)]
    """
    assert config.num_tasks is not None
    tasks, base = config.num_tasks, config.base_classes
    left, parts = (num_classes, tasks) if base is None else (num_classes - base, tasks - 1)
    if left < parts or left % parts:
        possible = [n + (base is not None) for n in range(2 - (base is not None), left + 1) if left % n == 0]
        said = f"continual.num_tasks={tasks} does not divide {num_classes} classes"
        if base is not None:
            said = f"continual.base_classes={base} leaves {left} of {num_classes} classes for {parts} tasks"
        raise UserError(f"{said} equally: give {_words(possible)} tasks" if possible else f"{said}: lower it")
    sizes = [left // parts] * parts if base is None else [base, *[left // parts] * parts]
    order, ends = class_order(config, num_classes), list(accumulate(sizes))
    return [tuple(order[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def seen_classes(tasks: Sequence[tuple[int, ...]], done: int) -> list[int]:
    """The classes of the first `done` tasks, in the order in which they came, each once."""
    return list(dict.fromkeys(number for task in tasks[:done] for number in task))


def _words(numbers: Sequence[int]) -> str:
    shown = [str(n) for n in numbers[:8]]
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + f" or {shown[-1]}"
