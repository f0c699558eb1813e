"""Pictures of a study: Optuna's own plots with our words on them, each drawn once, for PNG files and the HTML page.

What cannot be drawn yet is left out: a picture never ends a sweep.
"""

import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from pipeline.reporting import figures
from pipeline.sweep.study import tidy
from pipeline.sweep.study.front import feasible, front

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


class Picture(NamedTuple):
    """One plot. name: stem of its file; title: for people."""

    name: str
    title: str
    png: bytes


class _Plan(NamedTuple):
    """One plot to be made.

    Attributes:
        function: its name in optuna.visualization.matplotlib.
        lacks: why it cannot be drawn; empty: it can.
        tidy: what is changed of Optuna's drawing.
    """

    name: str
    title: str
    function: str
    study: optuna.Study
    arguments: dict[str, Any]
    lacks: str
    tidy: Callable[[Any, Any], None]


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
                picture = Picture(plan.name, plan.title, _png(plan))
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
    several, words = len(labels) > 1, labels[0]
    few = "" if len(done) > 1 else f"{len(done)} finished trials"
    grey = " (grey: infeasible)" if any(not feasible(t) for t in done) else ""
    plans = []
    for index, metric in enumerate(labels):
        suffix = f"_{index}" if several else ""
        one: dict[str, Any] = {"target_name": metric} | ({"target": partial(_value, index)} if several else {})
        none = "" if done else "no finished trial"
        history, by_parameter = f"{metric} of each trial", f"{metric} by parameter{grey}"
        plans += [
            _Plan(f"history{suffix}", history, "plot_optimization_history", shown, one, none, tidy.history),
            _Plan(f"slice{suffix}", by_parameter, "plot_slice", shown, one, few, tidy.slice),
        ]
    reported = [t for t in trials if t.intermediate_values and t.state in (*ENDED, TrialState.RUNNING)]
    best = next((t.number for t in front(shown)), None) if not several else None
    title = f"finished trials: {', '.join(labels)}, parameters"
    target = {} if several else {"target_name": words}
    parallel = tidy.Parallel([*labels, *varied])
    lines = tidy.Intermediate(words, {t.number: t.state for t in trials}, best)
    not_reported = "" if reported else "nothing reported"
    against = " against ".join(labels)
    flat = "" if len(labels) in (2, 3) and done else f"{len(labels)} objectives, {len(done)} finished trials"
    return [
        *plans,
        _Plan("parallel_coordinate", title, "plot_parallel_coordinate", shown, target, few, parallel),
        _importances(shown, done, varied, labels),
        _Plan("intermediate_values", f"{words} by epoch", "plot_intermediate_values", shown, {}, not_reported, lines),
        _Plan("pareto_front", against, "plot_pareto_front", shown, {"target_names": labels}, flat, tidy.pareto),
    ]


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


def _value(index: int, trial: FrozenTrial) -> float:
    return float(trial.values[index])


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
    return _Plan("importances", title, "plot_param_importances", turned, {}, lacks, tidy.importances)


# drawing -------------------------------------------------------------------------------------------------------------


def _png(plan: _Plan) -> bytes:
    """Whatever Optuna does to matplotlib's state (its style, open figures) is undone."""
    plt = figures.pyplot()
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
            return figures.png(figure, bbox_inches="tight")
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
