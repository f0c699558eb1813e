"""The only set-up of matplotlib: figures drawn without a display, written as PNG."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

DPI = 110


def figure(rows: int, columns: int, width: float, height: float, **layout: Any) -> tuple[Any, Any]:
    """A figure of this size in inches, and its axes; `layout`: further arguments of `Figure.subplots`.

    Without pyplot, whose windows and backend are the process's own: a notebook shows its figures as before.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # late: it takes half a second
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, **layout)


def png(made: Any, **options: Any) -> bytes:
    """The bytes of a figure; `options`: of `savefig`. Equal figures give equal bytes."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None}, **options)
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
    """Write a figure as PNG; the folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(made))
