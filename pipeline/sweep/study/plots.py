"""Pictures of a study: Optuna's own plots, drawn for paper (PNG) and for the browser (plotly), with our words on them.

What cannot be drawn yet is left out: a picture never ends a sweep.
"""

import io
import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from pipeline.sweep.study import tidy as study_tidy

if TYPE_CHECKING:
    from pipeline.sweep.space.space import SweepConfig

logger = logging.getLogger("asib")

LABELS = {
    "final/val_acc": "validation accuracy in %",
    "student/acc": "validation accuracy in %",
    "student/acc_ema": "validation accuracy in % (averaged weights)",
    "synergy/acc": "synergy's validation accuracy in %",
    "parameters/student": "student's parameters",
    "parameters/student_total": "student's parameters",
    "parameters/student_trainable": "student's trainable parameters",
    "train/images_per_second": "training images per second",
    "cost/seconds": "training time in s",
    "cost/gmacs": "training cost in GMACs",
    "cost/macs_per_image/student": "student's MACs per image",
}
"""What metrics are called on axes; any other goes by its name."""
FEWEST = 5
"""Finished trials from which importances say anything: they compare the best tenth with the rest."""
DPI = 100


@dataclass(frozen=True)
class Picture:
    """One plot. name: stem of its file; title: for people; png: the picture; html: a `<div>` that needs plotly.js."""

    name: str
    title: str
    png: bytes
    html: str


@dataclass(frozen=True)
class _Plan:
    """One plot to be made.

    Attributes:
        function: its name, in optuna.visualization.matplotlib and in optuna.visualization alike.
        lacks: why it cannot be drawn; empty: it can.
        tidy, tidy_html: what is changed of Optuna's drawing, in matplotlib's figure and in plotly's.
    """

    name: str
    title: str
    function: str
    study: optuna.Study
    arguments: dict[str, Any]
    lacks: str
    tidy: Callable[[Any, Any], None]
    tidy_html: Callable[[Any], Any] = lambda figure: None


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial keeps to all constraints."""
    return all(value <= 0 for value in trial.constraints.values())


def label(metric: str) -> str:
    """What a metric is called on an axis."""
    return LABELS.get(metric, metric)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Dotted keys -> their shortest endings that no other key has: `method.tau` -> `tau`."""

    def ending(key: str) -> str:
        parts = key.split(".")
        for n in range(1, len(parts)):
            tail = ".".join(parts[-n:])
            if sum(other == tail or other.endswith(f".{tail}") for other in keys) == 1:
                return tail
        return key

    return {key: ending(key) for key in keys}


def draw(study: optuna.Study, sweep: "SweepConfig") -> Iterator[Picture]:
    """Every picture that can be made of the study as it is now."""
    with _quiet():
        plans = _plans(study, sweep)
    for plan in plans:
        if plan.lacks:
            logger.debug("%s is left out: %s", plan.name, plan.lacks)
            continue
        try:
            with _quiet():
                picture = Picture(plan.name, plan.title, _png(plan), _html(plan))
        except Exception as error:  # a study may hold what a plot does not foresee
            logger.debug("%s is left out: %s: %s", plan.name, type(error).__name__, error, exc_info=True)
            continue
        yield picture


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna calls its plots experimental; both libraries warn of axes without extent."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


# what is drawn -------------------------------------------------------------------------------------------------------


def _plans(study: optuna.Study, sweep: "SweepConfig") -> list[_Plan]:
    shown = _snapshot(study, sweep)
    trials = shown.trials
    done = [t for t in trials if t.state == TrialState.COMPLETE and all(map(math.isfinite, t.values))]
    varied = sorted({name for t in done for name in t.params})
    labels = [label(o.metric) for o in sweep.objectives]
    several = len(labels) > 1
    few = "" if len(done) > 1 else f"{len(done)} finished trials"
    grey = " (grey: infeasible)" if any(not feasible(t) for t in done) else ""
    plans = []
    for index, words in enumerate(labels):
        suffix = f"_{index}" if several else ""
        one: dict[str, Any] = {"target_name": words}
        if several:
            one["target"] = _Target(index)
        plans += [
            _Plan(
                f"history{suffix}",
                f"{words} of each trial",
                "plot_optimization_history",
                shown,
                one,
                "" if done else "no finished trial",
                study_tidy.history,
            ),
            _Plan(
                f"slice{suffix}",
                f"{words} by parameter{grey}",
                "plot_slice",
                shown,
                one,
                few,
                study_tidy.slice,
                study_tidy.slice_html,
            ),
        ]
    reported = [t for t in trials if t.intermediate_values and t.state in (*ENDED, TrialState.RUNNING)]
    words = labels[0]
    best = _best(done, shown.directions[0]) if not several else None
    plans += [
        _Plan(
            "parallel_coordinate",
            f"finished trials: {', '.join(labels)}, parameters",
            "plot_parallel_coordinate",
            shown,
            {} if several else {"target_name": labels[0]},
            few,
            study_tidy.Parallel([*labels, *varied]),
            study_tidy.Parallel([*labels, *varied]).html,
        ),
        _importances(shown, done, varied, labels),
        _Plan(
            "intermediate_values",
            f"{words} by epoch",
            "plot_intermediate_values",
            shown,
            {},
            "" if reported else "nothing reported",
            study_tidy.Intermediate(words, {t.number: t.state for t in trials}, best),
            lambda figure: figure.update_layout(xaxis_title="epoch", yaxis_title=words),
        ),
        _Plan(
            "pareto_front",
            " against ".join(labels),
            "plot_pareto_front",
            shown,
            {"target_names": labels},
            "" if len(labels) in (2, 3) and done else f"{len(labels)} objectives, {len(done)} finished trials",
            study_tidy.pareto,
        ),
    ]
    return plans


ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


def _snapshot(study: optuna.Study, sweep: "SweepConfig") -> optuna.Study:
    """The study at one moment, in memory, with short names of parameters and what fits a hover text."""
    names = short_names(list(sweep.space))
    copy = optuna.create_study(directions=study.directions)
    for trial in study.get_trials():
        trial.params, trial.distributions = (
            {names.get(k, k): v for k, v in values.items()} for values in (trial.params, trial.distributions)
        )
        trial.user_attrs = {k: v for k, v in trial.user_attrs.items() if k in ("run_id", "seconds")}
        copy.add_trial(trial)
    copy.set_metric_names([label(o.metric) for o in sweep.objectives])
    return copy


class _Target:
    """The value of one objective of several."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, trial: FrozenTrial) -> float:
        return float(trial.values[self.index])


def _best(done: list[FrozenTrial], direction: optuna.study.StudyDirection) -> int | None:
    """Number of the best feasible trial."""
    sign = -1 if direction == optuna.study.StudyDirection.MAXIMIZE else 1
    return min(((sign * t.values[0], t.number) for t in done if feasible(t)), default=(0, None))[1]


def _importances(shown: optuna.Study, done: list[FrozenTrial], varied: list[str], labels: list[str]) -> _Plan:
    """Importances for each objective that is not the same everywhere.

    Optuna takes a chosen objective of several as one to be minimised: those to be maximised are turned around.
    """
    signs = [-1.0 if d == optuna.study.StudyDirection.MAXIMIZE else 1.0 for d in shown.directions]
    used = [k for k in range(len(labels)) if len({t.values[k] for t in done}) > 1]
    turned = optuna.create_study(directions=["minimize"] * max(len(used), 1))
    if used:
        turned.set_metric_names([labels[k] for k in used])
        for t in done:
            values = [signs[k] * t.values[k] for k in used]
            turned.add_trial(optuna.create_trial(values=values, params=t.params, distributions=t.distributions))
    lacks = ""
    if len(done) < FEWEST:
        lacks = f"{len(done)} finished trials, at least {FEWEST} are needed"
    elif len(varied) < 2:
        lacks = f"{len(varied)} parameters, at least 2 are compared"
    elif not used:
        lacks = "every trial has the same value"
    title = f"importance of the parameters for {' and '.join(labels[k] for k in used)}"
    tidy = study_tidy.importances
    return _Plan("importances", title, "plot_param_importances", turned, {}, lacks, tidy, study_tidy.importances_html)


# PNG -----------------------------------------------------------------------------------------------------------------


def _png(plan: _Plan) -> bytes:
    """Whatever Optuna does to matplotlib's state (its style, open figures) is undone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import optuna.visualization.matplotlib as drawn

    open_before = set(plt.get_fignums())
    try:
        with plt.rc_context():
            axes = getattr(drawn, plan.function)(plan.study, **plan.arguments)
            figure = getattr(axes, "figure", None) or axes.flat[0].figure
            for axis in figure.axes:
                axis.set_facecolor("white")
                axis.grid(color="#dddddd", linewidth=0.6)
                axis.set_axisbelow(True)
            plan.tidy(figure, axes)
            _set_title(figure, plan.title)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
            return buffer.getvalue()
    finally:
        for number in set(plt.get_fignums()) - open_before:
            plt.close(number)


def _set_title(figure: Any, title: str) -> None:
    """Over the panels where there are several, else over the one."""
    for axis in figure.axes:
        for place in ("left", "center", "right"):
            axis.set_title("", loc=place)
    wide = int(figure.get_size_inches()[0] * 9)
    text = "\n".join(textwrap.wrap(title, wide))
    if figure.get_suptitle():
        figure.suptitle(text, fontsize=12)
    else:
        figure.axes[0].set_title(text, fontsize=12, loc="left", y=1.03)


# HTML ----------------------------------------------------------------------------------------------------------------


def _html(plan: _Plan) -> str:
    import optuna.visualization as drawn

    figure = getattr(drawn, plan.function)(plan.study, **plan.arguments)
    figure.update_layout(title={"text": ""}, template="plotly_white", margin={"t": 30})
    plan.tidy_html(figure)
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))
