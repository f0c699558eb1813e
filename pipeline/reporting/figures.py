"""The only set-up of matplotlib: figures drawn without a display, written as PNG."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

DPI = 110


def pyplot() -> Any:
    """matplotlib.pyplot on a backend that needs no display; imported late, since it takes half a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def figure(rows: int, columns: int, width: float, height: float, **layout: Any) -> tuple[Any, Any]:
    """A figure of this size in inches, and its axes; `layout`: further arguments of `pyplot.subplots`."""
    made, axes = pyplot().subplots(rows, columns, figsize=(width, height), layout="constrained", **layout)
    return made, axes


def png(made: Any, **options: Any) -> bytes:
    """The bytes of a figure, which is then closed; `options`: of `savefig`. Equal figures give equal bytes."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None}, **options)
    pyplot().close(made)
    return buffer.getvalue()


def student_epochs(steps: Sequence[int], student: Sequence[int]) -> list[float]:
    """Student epochs done by the end of each epoch of a run; other epochs lie evenly between the student's.

    Args:
        steps: numbers of epochs from 0, all phases counted, as metrics are logged.
        student: those in which the student was trained; none: epochs of the run.

    Example:
        >>> student_epochs([0, 1, 2, 3], student=[1, 3])
        [0.5, 1.0, 1.5, 2.0]
    """
    if not student:
        return [step + 1.0 for step in steps]
    known = sorted({*student})
    return [float(x) for x in np.interp(steps, [-1, *known], range(len(known) + 1))]


def save(made: Any, path: Path) -> None:
    """Write a figure as PNG and close it; the folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(made))
