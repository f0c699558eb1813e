"""Pictures, tables and texts of hand-made studies: numbers, order, and everything that cannot be drawn yet."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
import pandas as pd
import pytest
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from PIL import Image

from pipeline.sweep.space.space import SweepConfig
from pipeline.sweep.study import plots, report
from tests.rendering import EVIL, elements, leads

STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
    "waiting": TrialState.WAITING,
}
SPACE: dict[str, Any] = {
    "method.kd_alpha": FloatDistribution(0.1, 0.9),
    "method.ib_beta": FloatDistribution(1e-6, 1e-2, log=True),
    "method.student_epochs_per_stage": CategoricalDistribution(["[3,3,3,3]", "[6,6]", "[12]"]),
    "dataset.batch_size": IntDistribution(16, 256, log=True),
    "optim.student_lr": FloatDistribution(1e-4, 1e-1, log=True),
    "method.tau": FloatDistribution(1, 8),
}
OBJECTIVES: list[dict[str, Any]] = [
    {"metric": "final/val_acc", "direction": "maximize"},
    {"metric": "parameters/student_total", "direction": "minimize"},
]


def sweep(keys: int = 2, objectives: int = 1, **more: Any) -> SweepConfig:
    def dimension(d: Any) -> dict[str, Any]:
        if isinstance(d, CategoricalDistribution):
            return {"type": "categorical", "choices": [json.loads(str(c)) for c in d.choices]}
        kind = "int" if isinstance(d, IntDistribution) else "float"
        return {"type": kind, "low": d.low, "high": d.high, "log": d.log}

    space = {key: dimension(d) for key, d in list(SPACE.items())[:keys]}
    return SweepConfig.model_validate(
        {"name": "toy", "space": space, "objectives": OBJECTIVES[:objectives], "trials": 30, **more}
    )


def params(keys: int, at: float) -> dict[str, Any]:
    """Parameters at a place in [0, 1] of every range."""
    found: dict[str, Any] = {}
    for key, d in list(SPACE.items())[:keys]:
        if isinstance(d, CategoricalDistribution):
            found[key] = d.choices[int(at * 2.999)]
        elif d.log:
            found[key] = type(d.low)(min(d.high, d.low * (d.high / d.low) ** at))
        else:
            found[key] = d.low + at * (d.high - d.low)
    return found


def trial(
    state: str = "complete", *values: float, keys: int = 2, at: float = 0.5, violated: float | None = None, **more: Any
) -> FrozenTrial:
    """`more`: reported, user (attributes), history (numbers of earlier attempts)."""
    system = {"retry_history": more["history"], "failed_trial": more["history"][0]} if "history" in more else {}
    chosen = params(keys, at)
    return create_trial(
        state=STATES[state],
        values=list(values) or None,
        params=chosen,
        distributions={key: SPACE[key] for key in chosen},
        intermediate_values=dict(enumerate(more.get("reported", []))),
        user_attrs=more.get("user", {}),
        system_attrs=system,
        constraints=None if violated is None else {"parameters/student_total": violated},
    )


def study(*trials: FrozenTrial, objectives: int = 1) -> optuna.Study:
    made = optuna.create_study(directions=[o["direction"] for o in OBJECTIVES[:objectives]])
    made.add_trials(trials)
    return made


def searched(count: int, keys: int = 2, objectives: int = 1, constrained: bool = False, seed: int = 0) -> optuna.Study:
    """Finished trials whose accuracy rises with the first parameter."""
    rng = np.random.default_rng(seed)
    trials = []
    for _ in range(count):
        at = [float(rng.random()) for _ in range(keys)]
        chosen = {key: params(keys, at[k])[key] for k, key in enumerate(list(SPACE)[:keys])}
        value = 50 + 20 * at[0] + float(rng.normal())
        values = [value, 1e5 * (1 + at[0])][:objectives]
        reported = [value * (1 - 0.5 ** (e + 1)) for e in range(6)]
        made = trial("complete", *values, keys=keys, reported=reported, violated=at[-1] - 0.7 if constrained else None)
        made.params = chosen
        trials.append(made)
    return study(*trials, objectives=objectives)


def various() -> optuna.Study:
    """One trial of each kind: 0 complete, 1 pruned, 2 lost and retried as 7, 3 failed, 4 running, 5 waiting, 6 best."""
    run = {"run_id": "r0", "seconds": 3.25, "folder": "/secret/place"}
    return study(
        trial("complete", 61.25, at=0.25, reported=[40, 50, 61], user=run),
        trial("pruned", reported=[30, 35.5], user={"run_id": "r1", "seconds": 1.5}),
        trial("failed", reported=[41.0]),
        trial("failed"),
        trial("running", reported=[20.0]),
        trial("waiting"),
        trial("complete", 70.0, at=0.75, reported=[40, 50, 60, 71], user={"run_id": "r6", "seconds": 4.0}),
        trial("complete", 65.0, at=0.5, reported=[41, 64], history=[2], user={"run_id": "r2"}),
        trial("complete", 61.25, at=0.25, user={"asib.repeats": 0}),
    )


def written(made: optuna.Study, what: SweepConfig, folder: Path) -> list[str]:
    return sorted(path.name for path in report.write(made, folder, what))


# tables and texts ----------------------------------------------------------------------------------------------------


def test_the_table_is_sorted_and_states_every_trial() -> None:
    found = report.table(various(), sweep())
    assert list(found["number"]) == [6, 7, 0, 8, 1, 4, 5, 3, 2]
    assert list(found["state"]) == ["complete"] * 4 + ["pruned", "running", "waiting", "failed", "retried"]
    rows = found.set_index("number")
    assert rows.loc[6, "final/val_acc"] == 70.0
    assert math.isnan(rows.loc[1, "final/val_acc"]), "a pruned trial has no final accuracy"
    assert rows.loc[1, "last"] == 35.5
    assert list(rows["epochs"].loc[[0, 1, 2, 5, 6]]) == [3, 2, 1, 0, 4]
    assert list(rows["attempts"].loc[[0, 7, 5, 2]]) == [1, 2, 0, 1]
    assert (rows.loc[0, "seconds"], rows.loc[0, "run_id"], rows.loc[0, "method.kd_alpha"]) == (3.25, "r0", 0.1 + 0.2)
    assert (rows.loc[8, "same_as"], rows.loc[8, "run_id"]) == (0, "r0"), "a repetition shows the run that it repeats"
    assert rows.loc[0, "same_as"] is pd.NA
    assert list(found.columns)[3:6] == ["last", "method.kd_alpha", "method.ib_beta"]


def test_infeasible_trials_are_never_the_best() -> None:
    made = study(trial("complete", 90.0, violated=1.0), trial("complete", 60.0, violated=0.0))
    found = report.table(made, sweep())
    assert list(zip(found["number"], found["state"], strict=True)) == [(1, "complete"), (0, "infeasible")]
    assert "final/val_acc 60 (trial 1)" in report.text(made, sweep())
    only = study(trial("complete", 90.0, violated=1.0))
    assert "no trial has finished within the constraints" in report.text(only, sweep())


def test_minimised_objectives_are_sorted_upwards() -> None:
    made = optuna.create_study(direction="minimize")
    made.add_trials([trial("complete", v) for v in (3.0, 1.0, 2.0)])
    what = sweep(objectives=1).model_copy(update={"objectives": sweep(objectives=2).objectives[1:]})
    assert list(report.table(made, what)["number"]) == [1, 2, 0]


def test_the_front_comes_first_with_several_objectives() -> None:
    values = [(60.0, 5.0), (70.0, 4.0), (50.0, 1.0), (65.0, 9.0)]
    made = study(*(trial("complete", *v) for v in values), objectives=2)
    assert list(report.table(made, sweep(objectives=2))["number"]) == [1, 2, 0, 3]
    text = report.text(made, sweep(objectives=2))
    assert "Pareto front, 2 trials" in text
    assert "trial 1: final/val_acc 70, parameters/student_total 4" in text


def test_the_terminal_shows_counts_and_the_best() -> None:
    assert report.text(various(), sweep()).splitlines() == [
        "toy: 8 of 30 trials: 4 complete, 1 pruned, 1 running, 1 waiting, 1 failed (1 retried)",
        "best: final/val_acc 70 (trial 6)",
        "  method.kd_alpha  0.7",
        "  method.ib_beta   0.001",
    ]


def test_the_note_links_runs_and_hides_the_password() -> None:
    storage = "postgresql+psycopg://ann:s3cret@db:5432/studies?password=s3cret&sslmode=require"
    text = report.note(various(), sweep(), experiment="12", storage=storage, parent="p0")
    assert "**best: final/val_acc 70**, trial 6" in text
    assert "- `method.kd_alpha`: 0.7" in text
    assert "| [6](#/experiments/12/runs/r6?workflowType=machine_learning) | 70 | 0.7 | 0.001 | 4 | 1 | 4 |" in text
    assert "| [7](#/experiments/12/runs/r2?workflowType=machine_learning) | 65 | 0.5 | 0.0001 | 2 | 2 |  |" in text
    assert "cfg=runs:/p0/best.yaml" in text
    assert "optuna-dashboard 'postgresql+psycopg://ann@db:5432/studies?sslmode=require'" in text
    assert "s3cret" not in text
    assert report.dashboard("sqlite:////a/b.db") == "optuna-dashboard sqlite:////a/b.db"


def test_the_note_fits_into_a_tag() -> None:
    long = {f"method.key_{k}": {"type": "categorical", "choices": ["x" * 150]} for k in range(6)}
    what = sweep(space=long)
    chosen = dict.fromkeys(long, "x" * 150)
    kinds: dict[str, Any] = {key: CategoricalDistribution(["x" * 150]) for key in long}
    made = study(*(create_trial(value=float(k), params=chosen, distributions=kinds) for k in range(20)))
    text = report.note(made, what, storage="sqlite:///a.db")
    assert len(text) <= 8000
    assert 1 <= text.count("x" * 150) / 6 - 1 < 10, "fewer rows than ten"


# pictures ------------------------------------------------------------------------------------------------------------

ALWAYS = ["study.html", "trials.csv"]
ONE = ["history.png", "intermediate_values.png", "parallel_coordinate.png", "slice.png"]
TWO = ["history_0.png", "history_1.png", "intermediate_values.png", "parallel_coordinate.png", "pareto_front.png"]
LIMITS: dict[str, tuple[optuna.Study, int, list[str]]] = {
    "no trial": (study(), 2, []),
    "one trial": (study(trial("complete", 50.0, reported=[40])), 2, ["history.png", "intermediate_values.png"]),
    "all pruned": (study(*(trial("pruned", reported=[30]) for _ in range(6))), 2, ["intermediate_values.png"]),
    "one parameter": (searched(8, keys=1), 1, ONE),
    "four trials": (searched(4), 2, ONE),
    "enough": (searched(8), 2, [*ONE, "importances.png"]),
    "equal trials": (study(*(trial("complete", 50.0, reported=[50]) for _ in range(8))), 2, ONE),
    "infinite values": (study(*(trial("complete", math.inf) for _ in range(8))), 2, []),
    "two objectives": (searched(8, objectives=2), 2, [*TWO, "importances.png", "slice_0.png", "slice_1.png"]),
    "two objectives, one trial": (searched(1, objectives=2), 2, sorted({*TWO} - {"parallel_coordinate.png"})),
    "some infeasible": (searched(8, constrained=True), 2, [*ONE, "importances.png"]),
    "all infeasible": (
        study(*(trial("complete", 50.0 + k, at=k / 7, reported=[50], violated=1.0) for k in range(8))),
        2,
        [*ONE, "importances.png"],
    ),
    "all infeasible, two objectives": (
        study(*(trial("complete", 50.0 + k, 8.0 - k, at=k / 7, violated=1.0) for k in range(8)), objectives=2),
        2,
        sorted({*TWO, "importances.png", "slice_0.png", "slice_1.png"} - {"intermediate_values.png"}),
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_what_cannot_be_drawn_is_left_out(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # the pixels are other tests'
    made, keys, expected = LIMITS[case]
    what = sweep(keys=keys, objectives=len(made.directions))
    assert written(made, what, tmp_path) == sorted([*ALWAYS, *expected])
    assert len(pd.read_csv(tmp_path / "trials.csv")) == len(made.trials)
    report.text(made, what)
    report.note(made, what, experiment="1", storage="sqlite:///a.db")


def test_a_picture_that_fails_is_named_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr(plots, "_slice", broken)
    with caplog.at_level("DEBUG", logger="asib"):
        assert "slice.png" not in written(searched(4), sweep(), tmp_path)
    assert "slice is left out: ZeroDivisionError: by accident" in caplog.text


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Texts below and above the axes, and titles, that cover one another."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [figure._suptitle] if figure._suptitle else []  # type: ignore[attr-defined]
    for axis in figure.axes:
        named = [axis.xaxis.label, axis._left_title]  # type: ignore[attr-defined]
        shown = [*axis.get_xticklabels(), *named] if axis.xaxis.get_visible() else []
        texts += [t for t in shown if t.get_text() and t.get_visible()]
    for axis in figure.axes:
        low, high = axis.get_xlim()
        outside = [t for t, at in zip(axis.get_xticklabels(), axis.get_xticks(), strict=True) if not low <= at <= high]
        texts = [t for t in texts if t not in outside]
    boxes = [(t.get_text(), t.get_window_extent(renderer).shrunk(0.98, 0.98)) for t in texts]
    return [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[i + 1 :] if box.overlaps(other)]


@pytest.mark.parametrize(("keys", "objectives"), [(1, 1), (3, 1), (6, 2)])
@pytest.mark.slow
def test_pictures_can_be_read(keys: int, objectives: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut off at the edges, no name covers another, and the metric is named in words."""
    covered: list[tuple[str, str]] = []
    save = Figure.savefig

    def looked_at(figure: Figure, *args: Any, **more: Any) -> None:
        save(figure, *args, **more)
        covered.extend(overlaps(figure))

    monkeypatch.setattr(Figure, "savefig", looked_at)
    made = searched(12, keys=keys, objectives=objectives, constrained=True)
    drawn = {p.name: p for p in plots.draw(made, sweep(keys=keys, objectives=objectives))}
    assert covered == []
    assert ("importances" in drawn) == (keys > 1)
    for picture in drawn.values():
        pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("L"))
        assert 300 <= pixels.shape[0] <= 800 or picture.name == "importances"
        assert 500 <= pixels.shape[1] <= 2400
        assert min(pixels[0].min(), pixels[-1].min(), pixels[:, 0].min(), pixels[:, -1].min()) > 240, picture.name
    assert all("validation accuracy in %" in p.title for n, p in drawn.items() if not n.endswith("_1"))


def test_the_page_needs_nothing_else_and_drawing_leaves_the_study_and_the_libraries_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    made, before = searched(8), dict(matplotlib.rcParams)
    trials, level, opened = made.trials, optuna.logging.get_verbosity(), plt.get_fignums()
    report.write(made, tmp_path, sweep())
    assert {k: v for k, v in matplotlib.rcParams.items() if before[k] != v} == {}
    assert made.trials == trials
    assert (optuna.logging.get_verbosity(), plt.get_fignums()) == (level, opened)
    page = (tmp_path / "study.html").read_text()
    assert not re.search(r"<(script|link)|(src|href)=(?!\"data:)", page)
    shown = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', page)
    assert sorted(base64.b64decode(png) for _, png in shown) == sorted(p.read_bytes() for p in tmp_path.glob("*.png"))
    assert len(shown) == 5
    assert "validation accuracy in % of each trial" in [words for words, _ in shown]
    assert "method.ib_beta" in page


def figures(made: optuna.Study, what: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """What is saved, by the name of the picture."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    return {picture.name: figure for picture, figure in zip(plots.draw(made, what), saved, strict=False)}


def test_log_dimensions_are_on_log_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    panels = figures(searched(8, keys=2), sweep(), monkeypatch)["slice"].axes
    scales = {axis.get_xlabel(): axis.get_xscale() for axis in panels}
    assert (scales["ib_beta"], scales["kd_alpha"]) == ("log", "linear")


def test_importances_are_for_high_accuracy_also_beside_another_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna takes a chosen objective as one to be minimised; what makes it high must not depend on a second one."""
    one = searched(40, keys=3)
    two = study(
        *(create_trial(values=[*t.values, 5.0], params=t.params, distributions=t.distributions) for t in one.trials),
        objectives=2,
    )
    expected = optuna.importance.get_param_importances(one)
    assert next(iter(expected)) == "method.kd_alpha"
    axis = figures(two, sweep(keys=3, objectives=2), monkeypatch)["importances"].axes[0]
    shown = [f"{v:.2f}" if v >= 0.01 else "<0.01" for v in expected.values()]
    assert [text.get_text().strip() for text in axis.texts] == shown[::-1]
    assert "student" not in axis.get_title(loc="left"), "an objective that is the same everywhere is left out"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["method.tau", "optim.student_lr"], ["tau", "student_lr"]),
        (["schedule.min_lr", "finetune.schedule.min_lr"], ["schedule.min_lr", "finetune.schedule.min_lr"]),
        (["model.teachers.0.name", "model.teachers.1.name"], ["0.name", "1.name"]),
        (["seed"], ["seed"]),
    ],
)
def test_short_names_are_unambiguous(keys: list[str], expected: list[str]) -> None:
    assert list(plots.short_names(keys).values()) == expected


@pytest.mark.parametrize("name", EVIL)
def test_words_of_a_study_load_nothing_and_lead_nowhere(name: str) -> None:
    """Choices are in its file; attributes of its trials are whatever somebody wrote into the database."""
    choices = CategoricalDistribution([json.dumps("plain"), json.dumps(name)])
    made = optuna.create_study(directions=["maximize"])
    for k in range(2):
        run = {"run_id": name if k else "ab"}
        chosen = {"method.kd_loss": choices.choices[k]}
        made.add_trial(create_trial(value=k, params=chosen, distributions={"method.kd_loss": choices}, user_attrs=run))
    space = {"method.kd_loss": {"type": "categorical", "choices": ["plain", name]}}
    what = SweepConfig.model_validate({"name": "toy", "space": space, "objectives": OBJECTIVES[:1], "trials": 2})
    note = report.note(made, what, experiment="12", storage="sqlite:///a.db", parent="p0")
    assert "#/experiments/12/runs/ab?workflowType=machine_learning" in leads(note)
    assert all(lead.startswith("#/experiments/12/runs/") for lead in leads(note))
    page = report.page(made, what, report.table(made, what), [])
    known = "html meta title style h1 h2 pre div p table thead tbody tr th td"
    assert elements(page) <= {*known.split()}
