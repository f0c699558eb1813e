"""The job of `-e evaluate`: a model, a synergy or averaged teachers on a split; measures, tables and pictures."""

from pathlib import Path

import pandas as pd

from pipeline.data.sources import ImageData
from pipeline.distill import networks, results
from pipeline.distill.train import load_data, prepare
from pipeline.evaluate import correctness, measures, modes, plots, speed
from pipeline.evaluate.measures import Evaluation
from pipeline.evaluate.modes import Part, Subject
from pipeline.evaluate.request import Request, check
from pipeline.evaluate.source import Source
from pipeline.reporting import tables
from pipeline.runs.run import Run

PAIRS = 50
"""Most-confused pairs in the table."""
SHOWN = 8
"""Most-confused pairs on the image sheet."""


def evaluate(run: Run, request: Request | None = None, source: Source | None = None) -> float:
    """Evaluate what `request` asks for (the configuration's `student` on the test split) and log everything.

    `source`: the model, if already known; by default what `student` names.

    Returns top-1 in percent on the split; of both splits, on the test split.

    Raises UserError: the model or fusion does not exist, or does not fit the data.
    """
    request = request or Request()
    config = run.config
    if source is None:
        check(request, config)
    prepare(config)
    data = load_data(run)
    subject = modes.subject(run, data, request, source)
    _describe(run, request, subject)
    run.ready()
    module, image = subject.module, networks.blank(config, data)
    found = speed.size(module, image) | (speed.latency(module, image) if request.speed else {})
    shown: list[str] = []
    for name in request.splits:
        part = modes.part(config, data, name)
        logits, teachers = subject.answers(part)
        evaluation = measures.evaluate_model(data, logits, part.y, name)
        found |= evaluation.metrics | measures.agreement(name, logits, teachers, part.y)
        if not run.follower:
            shown += write(run, data, evaluation, part)
    run.journal.tags(tables.logged(shown))
    run.journal.hold()  # written together with the run's end
    run.journal.metrics(found, 0)
    results.write_results(run, found)
    if not run.follower:
        title = f"{subject.title} on {data.name} ({request.split})"
        print(tables.text(title, [(name, _number(value)) for name, value in found.items()]), flush=True)
    return found[f"{request.splits[-1]}/acc"]


def write(run: Run, data: ImageData, evaluation: Evaluation, part: Part) -> list[str]:
    """Log an evaluation's tables and pictures; those of a split other than test in a folder of its name.

    Returns the artifacts that are tables.
    """
    to = "" if part.name == "test" else part.name
    folder = run.folder / to
    counts = measures.confusion(evaluation.labels, evaluation.predicted, data.num_classes)
    pairs = measures.confused_pairs(counts, data.classes, PAIRS)
    found = {"per_class": evaluation.per_class, "calibration": evaluation.bins, "confused_pairs": pairs}
    if "superclass" in evaluation.per_class:
        found["per_superclass"] = measures.by_superclass(evaluation.per_class, evaluation)
    for name, table in found.items():
        tables.write_json(table, folder / f"{name}.json")
    confusion = pd.DataFrame(counts, index=pd.Index(data.classes, name="label"), columns=list(data.classes))
    tables.write_csv(confusion, folder / "confusion.csv")
    correctness.write(evaluation, part.indices.numpy(), data.digest, data.classes, folder / correctness.FILE)
    plots.reliability(evaluation, folder / "reliability.png")
    results.draw_confusion(counts, data.classes, folder / "confusion.png")
    names = ["confusion.csv", correctness.FILE, "reliability.png", "confusion.png", *(f"{name}.json" for name in found)]
    if len(pairs):
        names.append("confused_pairs.png")
        sheet = folder / names[-1]
        plots.confused_sheet(pairs.head(SHOWN), evaluation, part.images, part.indices, data.classes, sheet)
    for name in names:
        run.journal.artifact(folder / name, to)
    return [str(Path(to, f"{name}.json")) for name in found]


def _describe(run: Run, request: Request, subject: Subject) -> None:
    """Record what is evaluated: tags, and the models as the run's inputs. (Parameters are the configuration.)"""
    source = subject.source
    made, version = (source.made_by, source.version) if source is not None else (None, None)
    taking_part = subject.teachers if request.mode != "single" else []
    for made_by in dict.fromkeys([made, *(teacher.made_by for teacher in taking_part)]):
        if made_by:
            run.journal.model_input(made_by)
    stated = {
        "asib.eval_split": request.split,
        "asib.mode": request.mode,
        "asib.weights": subject.hash(),
        "asib.student": made,
        "asib.model": version,
        "asib.fusion": request.fusion,
        "asib.teachers": ",".join(teacher.hash for teacher in subject.teachers),
        "asib.val_contaminated": "true" if "val" in request.splits and _saw_validation(subject) else "",
    }
    run.journal.tags({name: value for name, value in stated.items() if value})


def _saw_validation(subject: Subject) -> bool:
    """Whether anything that is evaluated may have been trained on these validation images."""
    model = subject.source is not None and networks.saw_validation(subject.record, subject.config, subject.data)
    return model or (subject.mode != "single" and any(teacher.saw_validation for teacher in subject.teachers))


def _number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() and value > 100 else f"{value:.4f}"
