"""Pictures of a study with our own labels, each drawn once, for PNG files and the HTML page.

What cannot be drawn yet is left out: a picture never ends a sweep.
"""

import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from pipeline.reporting import figures
from pipeline.sweep.space.dimensions import Range
from pipeline.sweep.study.front import feasible, front

if TYPE_CHECKING:
    from pipeline.sweep.space.space import SweepConfig

logger = logging.getLogger("asib")

LABELS = {
    "final/val_acc": "validation accuracy in %",
    "student/acc": "validation accuracy in %",
    "student/acc_ema": "validation accuracy in % (averaged weights)",
    "synergy/acc": "synergy's validation accuracy in %",
    "parameters/student_total": "student's parameters",
    "parameters/student_trainable": "student's trainable parameters",
    "train/images_per_second": "training images per second",
    "cost/seconds": "training time in s",
    "cost/gmacs": "training cost in GMACs",
    "cost/macs_per_image/student": "student's MACs per image",
}
"""Axis labels of metrics; any other metric is labelled with its name."""
FEWEST = 5
"""Finished trials needed for importances to mean anything: they compare the best tenth with the rest."""
GREY = "#999999"
LINES: dict[str, dict[str, Any]] = {
    "finished": {"color": "tab:blue", "alpha": 0.5, "linewidth": 1},
    "running": {"color": "tab:green", "alpha": 0.9, "linewidth": 1.2, "marker": "."},
    "pruned": {"color": "tab:red", "alpha": 0.5, "linewidth": 0.9, "marker": "x", "markersize": 5},
    "best": {"color": "black", "linewidth": 2.2, "zorder": 5},
}
"""Style of a trial's curve."""


class Picture(NamedTuple):
    """One plot. name: stem of its file; title: shown above it."""

    name: str
    title: str
    png: bytes


def label(metric: str) -> str:
    """The label of a metric on an axis."""
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


def steps(sweep: "SweepConfig") -> str:
    """What trials report: epochs, or whole seeds."""
    return "epochs" if sweep.seeds == 1 else "seeds"


def draw(study: optuna.Study, sweep: "SweepConfig") -> Iterator[Picture]:
    """Every picture that can be made of the study as it is now."""
    for name, title, paint in _possible(_Shown(study, sweep)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about axes without extent, and importances being for low values
                figure = paint()
                _set_title(figure, title)
                picture = Picture(name, title, figures.png(figure, bbox_inches="tight"))
        except Exception as error:  # a study may hold what a picture does not foresee
            logger.debug("%s is left out: %s: %s", name, type(error).__name__, error, exc_info=True)
            continue
        yield picture


class _Column(NamedTuple):
    """The trials' positions on an axis; for choices, `texts` label the positions 0, 1, …"""

    places: np.ndarray
    texts: Sequence[str] = ()
    log: bool = False


class _Shown:
    """The study at one moment.

    Attributes:
        done: finished trials whose values are finite. values: theirs, (trials, objectives).
        good: which of them satisfy the constraints. names: of the space's keys. step: epoch or seed, as reported.
        labels: of the objectives. signs: -1 for those to be maximised.
    """

    def __init__(self, study: optuna.Study, sweep: "SweepConfig") -> None:
        self.study, self.space, self.names = study, sweep.space, short_names(list(sweep.space))
        self.step = steps(sweep).removesuffix("s")
        self.trials = study.get_trials(deepcopy=False)
        finished = [t for t in self.trials if t.state == TrialState.COMPLETE]
        self.done = [t for t in finished if all(map(math.isfinite, t.values))]
        self.labels = [label(o.metric) for o in sweep.objectives]
        self.values = np.array([t.values for t in self.done]).reshape(-1, len(self.labels))
        self.good = np.array([feasible(t) for t in self.done], dtype=bool)
        self.numbers = np.array([t.number for t in self.done])
        self.signs = [-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in study.directions]
        self.best = {t.number for t in front(study)}

    def column(self, key: str) -> _Column:
        given, dimension = [t.params[key] for t in self.done], self.space[key]
        if isinstance(dimension, Range):
            return _Column(np.array(given, dtype=float), log=dimension.log)
        texts = [textwrap.shorten(str(value), 30, placeholder="…") for value in given]
        known, places = np.unique(texts, return_inverse=True)
        return _Column(places, known.tolist())


def _possible(shown: _Shown) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Name, title and function of each picture for which there are enough trials."""
    several, done = len(shown.labels) > 1, len(shown.done)
    infeasible = " (grey: infeasible)" if not shown.good.all() else ""
    for index, metric in enumerate(shown.labels):
        suffix = f"_{index}" if several else ""
        if done:
            yield f"history{suffix}", f"{metric} of each trial", partial(_history, shown, index)
        if done > 1:
            yield f"slice{suffix}", f"{metric} by parameter{infeasible}", partial(_slice, shown, index)
    if done > 1:
        dotted = " (dotted: infeasible)" if infeasible else ""
        words = f"finished trials: {', '.join(shown.labels)}, parameters{dotted}"
        yield "parallel_coordinate", words, partial(_parallel, shown)
    varied = [k for k in range(len(shown.labels)) if len(set(shown.values[:, k])) > 1]
    if done >= FEWEST and len(shown.space) > 1 and varied:
        words = f"importance of the parameters for {' and '.join(shown.labels[k] for k in varied)}"
        yield "importances", words, partial(_importances, shown, varied)
    kinds = {t.number: _kind(t, shown) for t in shown.trials if t.intermediate_values}
    if any(kinds.values()):
        yield "intermediate_values", f"{shown.labels[0]} by {shown.step}", partial(_curves, shown, kinds)
    if len(shown.labels) in (2, 3) and done:
        yield "pareto_front", " against ".join(shown.labels), partial(_pareto, shown)


def _kind(trial: FrozenTrial, shown: _Shown) -> str:
    """One of `LINES`, or nothing for a trial that is not shown."""
    if len(shown.labels) == 1 and trial.number in shown.best:
        return "best"
    states = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.RUNNING: "running"}
    return states.get(trial.state, "")


# pictures ------------------------------------------------------------------------------------------------------------


def _history(shown: _Shown, index: int) -> Any:
    figure, axis = _axes(1, 9, 4.5)
    values, good = shown.values[:, index], shown.good
    axis.scatter(shown.numbers[good], values[good], label="finished")
    if not good.all():
        axis.scatter(shown.numbers[~good], values[~good], color=GREY, label="infeasible")
    if len(shown.labels) == 1 and good.any():
        best = shown.signs[0] * np.minimum.accumulate(shown.signs[0] * values[good])
        axis.step(shown.numbers[good], best, where="post", color="tab:red", alpha=0.9, label="best so far")
    axis.set(xlabel="trial", ylabel=shown.labels[index])
    axis.legend(loc="best", fontsize=9)
    _whole_numbers(axis.xaxis)
    return figure


def _slice(shown: _Shown, index: int) -> Any:
    """A panel for each key, wide enough for its name and its ticks."""
    count, values = len(shown.space), shown.values[:, index]
    figure, axes = _axes(count, max(7, 1.5 + 2.9 * count), 4.2, squeeze=False, sharey=True)
    for axis, key in zip(axes[0], shown.space, strict=True):
        column = shown.column(key)
        axis.scatter(column.places[~shown.good], values[~shown.good], color=GREY)
        numbers = shown.numbers[shown.good]
        points = axis.scatter(
            column.places[shown.good], values[shown.good], c=numbers, cmap="viridis", vmin=0, vmax=shown.numbers[-1]
        )
        axis.set_xlabel(shown.names[key])
        if column.texts:
            axis.set_xticks(range(len(column.texts)), column.texts, rotation=30, ha="right", fontsize=8)
        elif column.log:
            _readable_decades(axis.xaxis)
    axes[0, 0].set_ylabel(shown.labels[index])
    _whole_numbers(figure.colorbar(points, ax=axes, label="trial").ax.yaxis)
    return figure


def _parallel(shown: _Shown) -> Any:
    """An axis for each objective and key, and a line across them for each trial."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    columns = {name: _Column(shown.values[:, k]) for k, name in enumerate(shown.labels)}
    columns |= {shown.names[key]: shown.column(key) for key in shown.space}
    figure, axis = figures.figure(1, 1, 2.5 + 2.1 * len(columns), 5)
    heights = []
    for at, column in enumerate(columns.values()):
        side = axis.twinx()
        side.spines["right"].set_position(("data", at))
        side.set_ylim(column.places.min(), column.places.max())  # equal values are spread apart
        if column.texts:
            side.set_yticks(range(len(column.texts)), column.texts)
        elif column.log:
            _readable_decades(side.yaxis)
        side.tick_params(labelsize=8)
        for tick in (*side.get_yticklabels(), *side.get_yticklabels(minor=True)):  # on top of the lines
            tick.set_bbox({"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6})
        ends = side.transAxes.inverted()
        heights.append([ends.transform(side.transData.transform((0, place)))[1] for place in column.places])
    first = shown.values[:, 0]
    colours = ScalarMappable(Normalize(first.min(), first.max()), "viridis" if shown.signs[0] < 0 else "viridis_r")
    for row, value, good in zip(zip(*heights, strict=True), first, shown.good, strict=True):
        axis.plot(row, color=colours.to_rgba(value), alpha=0.8, linewidth=1.4, linestyle="-" if good else ":")
    axis.set(xlim=(0, len(columns) - 1), ylim=(0, 1), yticks=[])
    axis.set_xticks(range(len(columns)), [textwrap.fill(name, 24) for name in columns], fontsize=9)
    figure.colorbar(colours, ax=figure.axes, label=shown.labels[0], pad=0.1)
    return figure


def _importances(shown: _Shown, varied: list[int]) -> Any:
    """PED-ANOVA for each of the objectives `varied`: which parameters make it good."""
    found = []
    for k in varied:  # low values of a target are the good ones
        target = partial(lambda k, trial: shown.signs[k] * trial.values[k], k)
        found.append(optuna.importance.get_param_importances(shown.study, target=target))
    keys, height = [*found[0]][::-1], 0.8 / len(found)
    figure, axis = _axes(1, 9, 1.2 + 0.5 * len(keys) * (1 if len(found) < 2 else 1.5))
    for n, (k, shares) in enumerate(zip(varied, found, strict=True)):
        places = np.arange(len(keys)) + (n - (len(found) - 1) / 2) * height
        bars = axis.barh(places, [shares[key] for key in keys], height, label=shown.labels[k])
        axis.bar_label(bars, [f" {shares[key]:.2f}" if shares[key] >= 0.01 else " <0.01" for key in keys])
    axis.set_yticks(range(len(keys)), [shown.names[key] for key in keys])
    axis.set(xlabel="share of the importance (PED-ANOVA)", xlim=(0, 1.15 * max(max(s.values()) for s in found)))
    if len(found) > 1:
        axis.legend(loc="lower right", fontsize=9)
    return figure


def _curves(shown: _Shown, kinds: dict[int, str]) -> Any:
    """A line for each trial: the best is thick, pruned ones end in a cross."""
    figure, axis = _axes(1, 9, 5)
    words = {"best": f"best, trial {min(shown.best, default=0)}"}
    for trial in shown.trials:
        if kind := kinds.get(trial.number):
            epochs = sorted(trial.intermediate_values)
            look = LINES[kind] | ({"marker": "x" if kind == "pruned" else "o"} if len(epochs) == 1 else {})
            crosses = [len(epochs) - 1] if kind == "pruned" else None
            name = words.setdefault(kind, kind)
            values = [trial.intermediate_values[epoch] for epoch in epochs]
            axis.plot(epochs, values, label=name, markevery=crosses, **look)
    handles, names = axis.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    axis.legend(once.values(), once.keys(), loc="lower right", fontsize=9)
    axis.set(xlabel=shown.step, ylabel=shown.labels[0])
    _whole_numbers(axis.xaxis)
    return figure


def _pareto(shown: _Shown) -> Any:
    solid = {"subplot_kw": {"projection": "3d"}} if len(shown.labels) == 3 else {}
    figure, axis = _axes(1, 8, 5.5, **solid)
    on_front = np.isin(shown.numbers, [*shown.best])
    looks = {"infeasible": (~shown.good, GREY), "dominated": (shown.good & ~on_front, "tab:blue")}
    for name, (which, colour) in (looks | {"on the front": (on_front, "tab:red")}).items():
        if which.any():
            axis.scatter(*shown.values[which].T, color=colour, label=name)
    axis.set(**dict(zip(("xlabel", "ylabel", "zlabel"), shown.labels, strict=False)))
    axis.legend(loc="best", fontsize=9)
    return figure


# parts of pictures ---------------------------------------------------------------------------------------------------


def _axes(columns: int, width: float, height: float, **layout: Any) -> tuple[Any, Any]:
    """A figure and its axes with a grid."""
    figure, axes = figures.figure(1, columns, width, height, **layout)
    for axis in figure.axes:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _set_title(figure: Any, title: str) -> None:
    """Set the title above all panels if there are several, else above the only one."""
    panels = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    text = "\n".join(textwrap.wrap(title, int(figure.get_size_inches()[0] * 9)))
    if len(panels) > 1:
        figure.suptitle(text, fontsize=12)
    else:
        panels[0].set_title(text, fontsize=12, loc="left", pad=10)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(8, integer=True))


def _readable_decades(axis: Any) -> None:
    """A log axis with powers of ten, or 1, 2, 5 within few of them; never labels in between, which overlap."""
    from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    few = math.log10(high / low) < 2.5
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}") if few else LogFormatterSciNotation())
    axis.set_minor_formatter(NullFormatter())
