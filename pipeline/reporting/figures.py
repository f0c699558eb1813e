"""The only set-up of matplotlib: figures drawn without a display, written as PNG."""

import io
from pathlib import Path
from typing import Any

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


def save(made: Any, path: Path) -> None:
    """Write a figure as PNG and close it; the folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(made))
