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
    "final/acc_val_selected": "test top-1 of the {who} {when}",
    "final/val_acc": "the same on validation images",
    "final/acc_last": "{who}, last epoch",
    "final/student_alone_acc": "student alone",
    r"final/teacher_(\d+)_acc": "teacher {0}, {teacher}",
    "final/teacher_avg_acc": "teachers averaged",
    "final/synergy_acc": "synergy",
    "continual/test_acc": "all classes seen",
    "continual/test_incremental_acc": "mean over tasks of all classes seen",
    "continual/test_average_acc": "mean over tasks at the end",
    "continual/test_forgetting": "forgetting",
    r"(test|val|train)/acc": "top-1 on the {0} split",
}
"""Metrics in percent (patterns) in the order in which people ask for them, and what they are."""
WATCHED = ("student/acc", "teacher/acc")
"""Of each epoch on the split of `asib.eval_split`: how far an interrupted run had come."""
RUNNING = "**running** again"
"""What the description of a continued run begins with until it ends or has a report."""
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
    how = f"**{ending.outcome}**{_progress(record)}" + (
        f": {escape.markdown(ending.message)}" if ending.message else ""
    )
    headline, *table = list(_results(record, config)) or [""]
    parts = ["" if ending.status == "FINISHED" else how, headline]
    # MLflow's UI hides all but a few lines: what the run found and how it is run again come first
    if COMMAND in record.tags and ending.status == "FINISHED":
        parts.append(repeated(record.tags[COMMAND]))
    elif COMMAND in record.tags and ending.outcome == "killed":
        parts.append(f"Continue: {escape.code(continued(step, record.tags[COMMAND], record.id))}")
    parts += table
    cost = [f"{record.metrics[name]:{form}} {unit}" for name, form, unit in COSTS if name in record.metrics]
    parts += ["Cost: " + ", ".join(cost)] if cost else []
    parts.append(_pictures(folder))
    return "\n\n".join(filter(None, parts))


def repeated(command: str) -> str:
    """The line with the command that asks for the same run anew."""
    return f"Repeat: {escape.code(command)}"


def _progress(record: Record) -> str:
    """What a run that did not finish had reached; empty if nothing was measured."""
    split = {"val": "validation", "test": "test"}.get(record.tags.get("asib.eval_split", ""), "evaluation")
    points = [record.histories[name][-1] for name in WATCHED if name in record.histories]
    return "".join(f" after epoch {epoch + 1}, at {value:.2f} % on {split} images" for epoch, value in points)


def _results(record: Record, config: Config) -> Iterator[str]:
    rows = list(results(record, config))
    if not rows:
        return
    (words, value), *rest = rows
    interval, n = "", 0 if record.correct is None else len(record.correct)
    if n and value == record.metrics.get("final/acc_val_selected"):
        from pipeline.reporting.statistics import wilson  # late: scipy takes half a second

        low, high = wilson(value / 100, n)
        interval = f" [{100 * low:.2f}, {100 * high:.2f}]"
        words += f"; 95 % interval over {n:,} images"
    yield f"**{value:.2f} %**{interval}: {escape.markdown(words)}"
    if rest:
        yield tables.markdown(["", "top-1 in %"], ((escape.markdown(name), f"{number:.2f}") for name, number in rest))


def results(record: Record, config: Config) -> Iterator[tuple[str, float]]:
    """What was measured, in words, and in percent; first what people ask for first."""
    teachers, own = config.model.teachers, record.tags.get("asib.teacher", "")
    who = f"teacher {shown(teachers[int(own)].name)}" if own else "student"
    selected = "final/val_acc" in record.metrics and config.continual.num_tasks is None
    last = "after the last task" if "continual/test_acc" in record.metrics else "after the last epoch"
    when = "at the epoch that validation selected" if selected else last
    for pattern, words in RESULTS.items():
        if pattern == "final/acc_last" and not selected and "final/acc_val_selected" in record.metrics:
            continue  # the first line says it
        for name in sorted(record.metrics):
            if found := re.fullmatch(pattern, name):
                k = int(found[1]) if "{teacher}" in words else 0
                teacher = shown(teachers[k].name) if k < len(teachers) else ""
                yield words.format(*found.groups(), teacher=teacher, who=who, when=when), record.metrics[name]


def _pictures(folder: Path) -> str:
    state = read_state(folder / "delivery.json") or {}
    run, experiment = state.get("run_id"), state.get("experiment_id")
    there = [name for name in PICTURES if (folder / name).exists()]
    if not (run and experiment and there):
        return ""
    to = {name: urls.run_page(experiment, run, f"/artifacts/{name}") for name in there}
    return "Pictures: " + ", ".join(f"[{name.partition('.')[0]}]({page})" for name, page in to.items())
