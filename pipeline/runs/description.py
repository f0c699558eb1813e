"""What a run's page in MLflow says of it: its result and what repeats it, then details, cost and pictures."""

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline import escape, urls
from pipeline.config import Config
from pipeline.files import read_state
from pipeline.reporting import tables
from pipeline.runs.ending import Ending
from pipeline.runs.naming import COMMAND, continued, shown
from pipeline.runs.records import Record

NOTE = "mlflow.note.content"
REPORTS = ("ablate", "compare", "overlap", "promote", "sweep", "table")
"""Steps whose own report is the description, once there is one."""
RESULTS = {
    "final/acc_val_selected": "test top-1 of the student at the epoch that validation selected",
    "final/val_acc": "the same epoch on validation images",
    "final/acc_last": "student, last epoch",
    "final/student_alone_acc": "student alone",
    r"final/teacher_(\d+)_acc": "teacher {0}, {teacher}",
    "final/teacher_avg_acc": "teachers averaged",
    "final/synergy_acc": "synergy",
    "continual/test_acc": "all classes seen",
    "continual/test_incremental_acc": "mean over tasks of all classes seen",
    "continual/test_average_acc": "mean over tasks at the end",
    "continual/test_forgetting": "forgetting",
    r"(test|val|train)/acc": "top-1 on the {0} split",
    "teacher/acc": "teacher",
}
"""Metrics in percent (patterns) in the order in which people ask for them, and what they are."""
COSTS = (
    ("cost/gmacs", ",.0f", "GMACs"),
    ("cost/seconds", ",.0f", "s of training"),
    ("cost/device_hours", ".2g", "device-hours"),
    ("cost/energy_kwh/cpu", ".2g", "kWh of the machine's processors"),
    ("cost/energy_kwh/gpu", ".2g", "kWh of GPUs"),
)
PICTURES = ("curves.png", "confusion.png", "tasks.png", "accuracy_matrix.png", "reliability.png")


def describe(record: Record, config: Config, step: str, folder: Path, ending: Ending) -> str:
    """Markdown for the description of an outermost or nested run that ends.

    Args:
        folder: the run's, for links to its pictures once the tracking server has the run.
    """
    how = f"**{ending.outcome}**" + (f": {escape.markdown(ending.message)}" if ending.message else "")
    headline, *table = list(_results(record, config)) or [""]
    parts = ["" if ending.status == "FINISHED" else how, headline]
    # MLflow's UI hides all but a few lines: what the run found and how it is run again come first
    if COMMAND in record.tags and ending.status == "FINISHED":
        parts.append(f"Repeat: {escape.code(record.tags[COMMAND])}")
    elif COMMAND in record.tags and ending.outcome == "killed":
        parts.append(f"Continue: {escape.code(continued(step, record.tags[COMMAND], record.id))}")
    parts += table
    cost = [f"{record.metrics[name]:{form}} {unit}" for name, form, unit in COSTS if name in record.metrics]
    parts += ["Cost: " + ", ".join(cost)] if cost else []
    parts.append(_pictures(folder))
    return "\n\n".join(filter(None, parts))


def _results(record: Record, config: Config) -> Iterator[str]:
    rows = list(results(record, config))
    if not rows:
        return
    (words, value), *rest = rows
    interval, n = "", 0 if record.correct is None else len(record.correct)
    if n and words == RESULTS["final/acc_val_selected"]:
        from pipeline.reporting.statistics import wilson  # late: scipy takes half a second

        low, high = wilson(value / 100, n)
        interval = f" [{100 * low:.2f}, {100 * high:.2f}]"
        words += f"; 95 % interval over {n:,} images"
    yield f"**{value:.2f} %**{interval}: {escape.markdown(words)}"
    if rest:
        yield tables.markdown(["", "top-1 in %"], ((escape.markdown(name), f"{number:.2f}") for name, number in rest))


def results(record: Record, config: Config) -> Iterator[tuple[str, float]]:
    """What was measured, in words, and in percent; first what people ask for first."""
    teachers = config.model.teachers
    for pattern, words in RESULTS.items():
        for name in sorted(record.metrics):
            if found := re.fullmatch(pattern, name):
                k = int(found[1]) if "{teacher}" in words else 0
                teacher = shown(teachers[k].name) if k < len(teachers) else ""
                yield words.format(*found.groups(), teacher=teacher), record.metrics[name]


def _pictures(folder: Path) -> str:
    state = read_state(folder / "delivery.json") or {}
    run, experiment = state.get("run_id"), state.get("experiment_id")
    there = [name for name in PICTURES if (folder / name).exists()]
    if not (run and experiment and there):
        return ""
    to = {name: urls.run_page(experiment, run, f"/artifacts/{name}") for name in there}
    return "Pictures: " + ", ".join(f"[{name.partition('.')[0]}]({page})" for name, page in to.items())
