"""What users see of continual learning: metrics of its run, the accuracy matrix as table and picture, its curves."""

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.config import Config
from pipeline.distill.results import SMOKE
from pipeline.reporting import figures, tables
from pipeline.runs.run import Run
from pipeline.training.continual.report import Row, metrics

LAST = ("cost/macs_per_image/",)
"""Costs that belong to a network and not to a task."""


def after_task(rows: Sequence[Row], split: str, names: Sequence[str], untrained: Row | None) -> dict[str, float]:
    """The metrics of a run after the last of these rows: of the matrix so far, and of every task in it."""
    of_tasks = rows[-1]["class_il"]
    assert isinstance(of_tasks, list)
    shown = {f"{_word(names[i])}/{split}_acc": value for i, value in enumerate(of_tasks[: len(rows)])}
    return metrics(rows, split, untrained) | shown


def _word(name: str) -> str:
    return name.replace(" ", "_")


def final(rows: Mapping[str, Sequence[Row]], untrained: Mapping[str, Row]) -> dict[str, float]:
    """The final metrics. The last student is the selected one: validation only watches."""
    found: dict[str, float] = {}
    for split, of_split in rows.items():
        found |= metrics(of_split, split, untrained.get(split))
    if "test" in rows:
        found |= dict.fromkeys(("final/acc_last", "final/acc_val_selected"), found["continual/test_acc"])
    if "val" in rows:
        found["final/val_acc"] = found["continual/val_acc"]
    return found


def summed(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The costs of all tasks together."""
    found: dict[str, float] = {}
    for of_task in costs:
        for name, value in of_task.items():
            if name.startswith(LAST):
                found[name] = value
            elif name.startswith("cost/"):
                found[name] = found.get(name, 0.0) + value
    return found


def pictures(run: Run, rows: Sequence[Row], names: Sequence[str]) -> None:
    """The accuracy matrix as a table and a picture, and each task's accuracy over the tasks as another."""
    import pandas  # late: it takes half a second

    kinds = {"class_il": "among all classes seen", "task_il": "among the task's classes"}
    whole = {kind: np.array([row[kind] for row in rows]) for kind in kinds}
    frames = [
        pandas.DataFrame(r, columns=list(names)).assign(kind=kind, after=list(names)) for kind, r in whole.items()
    ]
    path = run.folder / "accuracy_matrix.csv"
    tables.write_csv(pandas.concat(frames)[["kind", "after", *names]].round(4), path, index=False)
    run.journal.artifact(path)
    made, axes = figures.figure(1, 2, 11, 5)
    for axis, (kind, title) in zip(axes, kinds.items(), strict=True):
        r = np.where(np.tri(len(rows), dtype=bool), whole[kind], np.nan)
        image = axis.imshow(r, vmin=0, vmax=100, cmap="viridis")
        for (after, task), value in np.ndenumerate(r):
            if not np.isnan(value) and len(rows) <= 12:
                color = "black" if value > 60 else "white"
                axis.text(task, after, f"{value:.1f}", ha="center", va="center", fontsize=8, color=color)
        axis.set_xticks(range(len(rows)), names, rotation=90)
        axis.set_yticks(range(len(rows)), [f"after {name}" for name in names])
        axis.set(title=f"test accuracy in %, {title}")
    made.colorbar(image, ax=axes)
    figures.save(made, run.folder / "accuracy_matrix.png")
    made, axes = figures.figure(1, 2, 12, 4)
    for axis, (kind, title) in zip(axes, kinds.items(), strict=True):
        for task, name in enumerate(names):
            axis.plot(range(task + 1, len(rows) + 1), whole[kind][task:, task], marker=".", label=name)
        if kind == "class_il":
            axis.plot(range(1, len(rows) + 1), [row["seen"] for row in rows], "k--", label="all seen")
        axis.set(title=f"test accuracy in %, {title}", xlabel="tasks done", ylim=(0, 100))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figures.save(made, run.folder / "tasks.png")
    for name in ("accuracy_matrix.png", "tasks.png"):
        run.journal.artifact(run.folder / name)


def print_results(
    config: Config, method: str, found: Mapping[str, float], rows: Sequence[Row], names: Sequence[str]
) -> None:
    """The matrix, and what it comes to. `method`: as it was asked for."""
    body = []
    for after, row in enumerate(rows):
        of_tasks = row["class_il"]
        assert isinstance(of_tasks, list)
        cells = [f"{value:.1f}" if task <= after else "" for task, value in enumerate(of_tasks)]
        body.append((f"after {names[after]}", *cells, f"{row['seen']:.1f}"))
    note = f" ({SMOKE})" if config.dataset.name == "cifar100_sample" else ""
    title = f"{config.dataset.name}: test top-1 in % of each task, all seen; {method}, seed {config.seed}"
    print(tables.text(title + note, body), flush=True)
    names_of = {
        "continual/test_average_acc": "average accuracy",
        "continual/test_incremental_acc": "average incremental accuracy",
        "continual/test_forgetting": "forgetting",
        "continual/test_bwt": "backward transfer",
        "continual/test_task_il_average_acc": "average accuracy, task known",
    }
    print(tables.text("at the end", [(word, f"{found[key]:.2f}") for key, word in names_of.items()]), flush=True)
