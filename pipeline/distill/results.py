"""What users see of a run: tables in the terminal, pictures, `results.json` and `summary.csv`."""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import Config
from pipeline.journal import decode_number, read_entries
from pipeline.reporting import figures, tables
from pipeline.runs.run import Run

SMOKE = "smoke test: cannot rank methods"


# tables --------------------------------------------------------------------------------------------------------------


def print_results(config: Config, results: dict[str, float]) -> None:
    """Student alone, each teacher, their average, the synergy, the distilled student: test top-1 in percent."""
    student, trained = config.model.student.name, "distilled" if config.method.distils else "trained"
    known = [
        (f"student alone ({student})", "final/student_alone_acc"),
        *((f"teacher {k} ({t.name})", f"final/teacher_{k}_acc") for k, t in enumerate(config.model.teachers)),
        *([("teachers averaged", "final/teacher_avg_acc")] if len(config.model.teachers) > 1 else []),
        ("synergy", "final/synergy_acc"),
        (f"{trained} student ({student})", "final/acc_val_selected"),
    ]
    rows = [(name, f"{results[key]:.2f}") for name, key in known if key in results]
    title = f"{config.dataset.name}: test top-1 in %, seed {config.seed}"
    print(tables.text(f"{title} ({SMOKE})" if config.dataset.name == "cifar100_sample" else title, rows), flush=True)


# numbers -------------------------------------------------------------------------------------------------------------


def predictions(run: Run, predicted: Tensor, y: Tensor) -> None:
    """`predictions.npz`: labels and predictions on the test split, image by image, for paired comparisons."""
    path = run.folder / "predictions.npz"
    labels, found = (values.cpu().numpy().astype(np.int32) for values in (y, predicted))
    np.savez_compressed(path, labels=labels, predictions=found)
    run.journal.artifact(path)


def metrics_of(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Every metric in the run's record: name -> (step, value) in order."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for entry in read_entries(run.folder / "journal.jsonl")[0]:
        if entry.kind == "metrics":
            for name, value in entry.data["values"].items():
                found[name].append((entry.data["step"], decode_number(value)))
    return dict(found)


def write_results(run: Run, results: dict[str, float]) -> None:
    """`results.json`, and `summary.csv` with the columns of the research code's ExperimentLogger."""
    import pandas  # late: it takes half a second

    if run.follower:
        return
    seconds = time.monotonic() - run.started
    everything = {"run": run.folder.name, "step": run.step, "total_time_sec": seconds, "metrics": results}
    run.write("results.json", json.dumps(everything, indent=2, sort_keys=True) + "\n")
    columns = _experiment_logger(run, results, seconds)
    path = run.folder / "summary.csv"
    row = {k: f"{v:.2f}" if k.endswith(("acc", "sec")) and v != "" else v for k, v in columns.items()}
    tables.write_csv(pandas.DataFrame([row]), path, index=False)
    run.journal.artifact(path)


def _experiment_logger(run: Run, results: dict[str, float], seconds: float) -> dict[str, Any]:
    config, history = run.config, metrics_of(run)
    m, o = config.method, config.optim
    data = [entry.data for entry in read_entries(run.folder / "journal.jsonl")[0] if entry.kind == "dataset"]
    row: dict[str, Any] = {
        "exp_id": run.folder.name,
        "csv_filename": "summary.csv",
        "total_time_sec": seconds,
        "final_student_acc": results.get("final/acc_val_selected", results.get("test/acc", "")),
        "num_classes": data[0]["profile"]["classes"] if data else "",
        "batch_size": config.dataset.batch_size,
        "ce_alpha": m.ce_alpha,
        "kd_alpha": m.kd_alpha,
        **{key: _or_empty(getattr(m, key, None)) for key in ("use_ib", "ib_beta", "ib_epochs_per_stage", "use_cccp")},
        "optimizer": o.optimizer,
        "student_lr": o.student_lr,
        "student_weight_decay": o.student_weight_decay,
    }
    row |= {f"student_ep{i + 1}_acc": v for i, (_, v) in enumerate(history.get("student/acc", []))}
    row |= {f"teacher_ep{step + 1}_syn_acc": v for step, v in history.get("synergy/acc", [])}
    return row


def _or_empty(value: Any) -> Any:
    return "" if value is None else value


# pictures ------------------------------------------------------------------------------------------------------------


def curves(run: Run) -> None:
    """`curves.png`: accuracies, losses and schedules over the student's epochs; A-steps are shaded."""
    history = metrics_of(run)
    panels = (
        ("accuracy in %", ("student/acc", "synergy/acc", "synergy/acc_ema")),
        ("loss", ("a_step/loss", "a_step/ce", "a_step/kd", "b_step/loss", "b_step/ce", "b_step/kd")),
        ("certainty, gate, KD weight", ("a_step/cw_mean", "gate/open", "schedule/kd_weight")),
    )
    made, axes = figures.figure(1, len(panels), 15, 4)
    student = [step for step, _ in history.get("student/acc", [])]
    a_epochs = [step for step, _ in history.get("a_step/loss", [])]
    begins, ends = (figures.student_epochs([step + shift for step in a_epochs], student) for shift in (-1, 0))
    for axis, (title, names) in zip(axes, panels, strict=True):
        for name in names:
            if name in history:
                steps, values = zip(*history[name], strict=True)
                axis.plot(figures.student_epochs(steps, student), values, marker=".", label=name)
        for begin, end in zip(begins, ends, strict=True):
            axis.axvspan(begin, end, color="tab:blue", alpha=0.08, lw=0)
        axis.set(title=title, xlabel="student epochs (A-steps shaded)" if student else "epochs")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    teachers = [history[k][-1][1] for k in sorted(history) if k.startswith("teacher/") and k.endswith("/acc")]
    for value in teachers:
        axes[0].axhline(value, color="grey", ls=":", lw=1)
    if "teacher/avg_acc" in history:
        axes[0].axhline(history["teacher/avg_acc"][-1][1], color="black", ls="--", lw=1)
    title = f"{run.config.dataset.name}, seed {run.config.seed}; grey: teachers, dashed: their average"
    made.suptitle(title, fontsize=10)
    figures.save(made, run.folder / "curves.png")
    run.journal.artifact(run.folder / "curves.png")


def confusion(run: Run, predicted: Tensor, y: Tensor, classes: tuple[str, ...]) -> None:
    """`confusion.png` of the test split."""
    n = len(classes)
    counts = torch.bincount(y.cpu() * n + predicted.cpu(), minlength=n * n).reshape(n, n)
    draw_confusion(counts.numpy(), classes, run.folder / "confusion.png")
    run.journal.artifact(run.folder / "confusion.png")


def draw_confusion(counts: NDArray[np.int64], classes: tuple[str, ...], path: Path) -> None:
    """Counts (N, N) as shares of each label's images: rows are labels, columns predictions; numbers if they fit."""
    from matplotlib.colors import PowerNorm

    n = len(classes)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    made, axis = figures.figure(1, 1, 8, 7)
    image = axis.imshow(shares, norm=PowerNorm(0.5, 0, 1), cmap="viridis", interpolation="nearest")  # errors are rare
    made.colorbar(image, ax=axis, label="share of the label's images")
    axis.set(xlabel="predicted", ylabel="label")
    if n <= 30:
        axis.set_xticks(range(n), classes, rotation=90, fontsize=7)
        axis.set_yticks(range(n), classes, fontsize=7)
    if n <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "black" if shares[row, column] > 0.4 else "white"
            axis.text(column, row, counts[row, column], ha="center", va="center", fontsize=6, color=color)
    figures.save(made, path)
