"""Tables for the terminal, Markdown, CSV and MLflow. A name in a cell is text, never a formula."""

import json
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import escape

if TYPE_CHECKING:
    import pandas


def text(title: str, rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table for the terminal: the title, a rule, and the rows with their first `left` columns flush left."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = [
        "  ".join(c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=False)))
        for row in rows
    ]
    lines = [line.rstrip() for line in lines]
    return "\n".join([title, "-" * max(map(len, [title, *lines])), *lines])


WIDTH = 100
"""Columns of a terminal that a table may fill."""


def blocks(title: str, rows: Sequence[Sequence[str]], left: int = 1, width: int = WIDTH) -> str:
    """As `text`, cut between columns where it is wider than `width`: the first column is repeated.

    Long cells are shortened, so that each column fits beside the first.
    """
    longest = width // 2 - 1
    cut = [[cell if len(cell) <= longest else cell[: longest - 1] + "…" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cut, strict=True)]
    parts: list[list[int]] = [[0]]
    for k in range(1, len(widths)):
        if sum(widths[i] + 2 for i in parts[-1]) + widths[k] > width:
            parts.append([0])
        parts[-1].append(k)
    title = title if len(title) <= width else title[: width - 1] + "…"
    return "\n\n".join(text(title, [[row[k] for k in part] for row in cut], left) for part in parts)


def latex(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A `tabular` of cells that are text; the first column is flush left, the others right. Needs no package."""
    lines = [" & ".join(map(escape.latex, cells)) + r" \\" for cells in (head, *rows)]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    return "\n".join([begin, r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}"])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table of cells that are Markdown; the first `left` columns are flush left, the others right."""
    rule = ["---" if k < left else "--:" for k in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def write_csv(table: "pandas.DataFrame", path: Path, **options: Any) -> None:
    """A table as CSV in which a spreadsheet sees no formula: not in cells, index or header."""
    safe = table.copy()
    for place in range(table.shape[1]):
        column = table.iloc[:, place]
        if column.dtype.kind not in "biufcMm":
            safe.isetitem(place, column.map(escape.cell))
    safe.index = table.index.map(escape.cell).rename(table.index.name)
    safe.columns = table.columns.map(escape.cell).rename(table.columns.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    safe.to_csv(path, **options)


def write_json(table: "pandas.DataFrame", path: Path) -> None:
    """A table as `mlflow.log_table` writes it; anything but a number in a column of numbers is null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_json(path, orient="split", index=False)


def logged(paths: Iterable[str]) -> dict[str, str]:
    """The tag by which MLflow's UI finds tables among a run's artifacts."""
    return {"mlflow.loggedArtifacts": json.dumps([{"path": path, "type": "table"} for path in paths])}
