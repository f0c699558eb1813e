"""Accuracy against the share of common classes: over all test images, and apart for classes by who is taught them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.ablate.plan import Cell
from pipeline.compare.compare import ACCURACY
from pipeline.compare.report import with_deviation
from pipeline.config import Config
from pipeline.data.sources import ImageData
from pipeline.distill.results import SMOKE
from pipeline.distill.teachers import with_classes
from pipeline.reporting import figures, tables
from pipeline.runs.records import Record
from pipeline.runs.run import Run

COLUMNS = {
    "acc": "all classes",
    "acc common": "classes that all teachers are taught",
    "acc own": "classes that one teacher is taught",
    "teachers averaged": "teachers averaged",
    "disagreement": "teachers disagree, in %",
}
"""Columns of the table, in words."""
EXPLAINED = (
    "Test top-1 in % of the epoch that validation chose; mean over seeds ± standard deviation (n - 1). rho: share of "
    "the classes that all teachers are taught; each other class is taught to one of them. Disagreement: on the "
    "evaluation split, how often the teachers' most likely classes are not all the same."
)


def log(run: Run, data: ImageData, results: Sequence[tuple[Cell, Record]]) -> None:
    """Write the table as CSV, as Markdown and drawn, log these files to the run, and print it."""
    found = summary(data, results)
    folder = run.folder / "overlap"
    tables.write_csv(found, folder / "overlap.csv", index=False)
    title = f"{data.name}, teachers of class subsets" + (f" ({SMOKE})" if data.name == "cifar100_sample" else "")
    head, rows = _shown(found)
    (folder / "overlap.md").write_text(f"# {title}\n\n{tables.markdown(head, rows, left=2)}\n\n{EXPLAINED}\n")
    _draw(found, title, folder / "overlap.png")
    for kind in ("csv", "md", "png"):
        run.journal.artifact(folder / f"overlap.{kind}", "overlap")
    print(tables.blocks(title, [head, *rows], left=2), flush=True)


def summary(data: ImageData, results: Sequence[tuple[Cell, Record]]) -> pd.DataFrame:
    """A row for each method and share: mean over seeds and `… std` of each of `COLUMNS`, in %; NaN where unknown."""
    rows = []
    for cell, record in results:
        teachers = _teachers_of_each_class(cell.config, data)[data.test_y.numpy()]
        common = teachers == len(cell.config.model.teachers)
        rows.append(
            {
                "method": cell.tags["asib.row"],
                "rho": 1.0 if cell.config.model.overlap is None else cell.config.model.overlap,
                "acc": record.metrics[ACCURACY],
                "acc common": _share_right(record, common),
                "acc own": _share_right(record, ~common),
                "teachers averaged": record.metrics.get("final/teacher_avg_acc", np.nan),
                "disagreement": 100 * record.metrics.get("teacher/disagreement", np.nan),
            }
        )
    groups = pd.DataFrame(rows).groupby(["method", "rho"], sort=False)
    found = groups.size().rename("seeds").to_frame()
    for column in COLUMNS:
        found[column], found[f"{column} std"] = groups[column].mean(), groups[column].std()
    return found.reset_index()


def _teachers_of_each_class(config: Config, data: ImageData) -> "np.ndarray":
    """(N,) how many teachers each class is taught to."""
    counts = np.zeros(data.num_classes, dtype=np.int64)
    for teacher in with_classes(config, data).model.teachers:
        counts[list(teacher.classes) or slice(None)] += 1
    return counts


def _share_right(record: Record, chosen: "np.ndarray") -> float:
    """Accuracy in % on the test images that are chosen (n,); NaN without any, or without predictions."""
    if record.correct is None or not chosen.any():
        return np.nan
    return 100 * float(record.correct[chosen].mean())


def _shown(found: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The table's head and its rows as text."""
    rows = [
        [
            row["method"],
            f"{row['rho']:g}",
            str(row["seeds"]),
            *(with_deviation(row[c], row[f"{c} std"]) for c in COLUMNS),
        ]
        for row in found.to_dict("records")
    ]
    return ["method", "rho", "seeds", *COLUMNS], rows


def _draw(found: pd.DataFrame, title: str, path: Path) -> None:
    """A panel for each kind of classes with a line for each method, and one about the teachers."""
    made, axes = figures.figure(1, 4, 18, 4)
    for axis, column in zip(axes, ("acc", "acc common", "acc own"), strict=False):
        for method, rows in found.sort_values("rho").groupby("method", sort=False):
            axis.errorbar(
                rows["rho"], rows[column], rows[f"{column} std"].fillna(0), marker=".", capsize=2, label=method
            )
        axis.set(title=f"student: {COLUMNS[column]}", ylabel="test top-1 in %")
    axes[0].legend(fontsize=8)
    of_teachers = found.groupby("rho")[["teachers averaged", "disagreement"]].mean()
    for column, line in (("teachers averaged", "-"), ("disagreement", "--")):
        axes[3].plot(of_teachers.index, of_teachers[column], line, marker=".", color="black", label=COLUMNS[column])
    axes[3].set(title="teachers", ylabel="%")
    axes[3].legend(fontsize=8)
    for axis in axes:
        axis.set(xlabel="rho: share of common classes", xlim=(-0.05, 1.05))
        axis.grid(alpha=0.3)
    made.suptitle(title, fontsize=10)
    figures.save(made, path)
