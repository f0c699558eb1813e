"""What is changed of Optuna's plots so that they can be read: sizes, names of axes, ticks, colours, legends.

Each takes matplotlib's figure and what Optuna returned.
"""

import math
import re
from typing import Any

from optuna.trial import TrialState


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _readable_decades(axis: Any) -> None:
    """On a log axis: powers of ten, or 1, 2, 5 within few of them; never labels in between, which overlap."""
    from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, LogLocator, NullFormatter

    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    few = math.log10(max(low, high) / min(low, high)) < 2.5
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}") if few else LogFormatterSciNotation())
    axis.set_minor_formatter(NullFormatter())


def history(figure: Any, axis: Any) -> None:
    figure.set_size_inches(9, 4.5)
    axis.set_xlabel("trial")
    _whole_numbers(axis)
    for line in axis.lines:  # the best so far, where there is one objective
        line.set(label="best so far", drawstyle="steps-post", alpha=0.9)
    points = axis.collections
    points[0].set_label("finished")
    if len(points[-1].get_offsets()):
        points[-1].set(label="infeasible", color="#999999")
    axis.legend(loc="best", fontsize=9)


def importances(figure: Any, axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    figure.set_size_inches(9, 1.2 + 0.5 * len(axis.get_yticks()) * (1 if len(axis.containers) < 2 else 1.5))
    axis.set(xlabel="share of the importance (PED-ANOVA)", ylabel="")
    axis.set_xlim(0, max(bar.get_width() for bars in axis.containers for bar in bars) * 1.15)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    for text in axis.texts:
        text.set_text(f" {text.get_text()}")
    if len(axis.containers) > 1:
        axis.legend(loc="lower right", fontsize=9)
    elif axis.get_legend():
        axis.get_legend().remove()


def slice(figure: Any, axes: Any) -> None:
    """A panel wide enough for its name and its ticks each; the colour bar beside the last."""
    panels = list(getattr(axes, "flat", [axes]))
    bars = [axis for axis in figure.axes if axis not in panels]
    figure.set_size_inches(max(7, 1.5 + 2.9 * len(panels)), 4.2)
    if len(panels) > 1:  # the colour bar of a single one does not go with it
        figure.set_layout_engine("constrained")
    for axis in panels:
        _readable_decades(axis.xaxis)
        for points in axis.collections:
            points.set_cmap("viridis")
        texts = [tick.get_text().strip("'") for tick in axis.get_xticklabels()]
        if axis.xaxis.get_converter() is not None:  # categories: names instead of numbers
            axis.set_xticks(axis.get_xticks(), texts)
            axis.tick_params(axis="x", labelrotation=30, labelsize=8)
            for tick in axis.get_xticklabels():
                tick.set_ha("right")
    for axis in bars:
        axis.set_ylabel("trial")
        _whole_trials(axis)


def _whole_trials(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))


class Parallel:
    """Axes side by side: names below each, ticks that can be read on top of the lines.

    Args:
        names: objectives, then parameters, in the order of the axes.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = [_in_lines(name) for name in names]

    def __call__(self, figure: Any, axis: Any) -> None:
        figure.set_size_inches(2.5 + 1.9 * len(self.names), 5)
        for lines in axis.collections:
            lines.set(cmap="viridis_r" if lines.get_cmap().name.endswith("_r") else "viridis", alpha=0.8, linewidth=1.4)
        axis.set_xticks(range(len(self.names)), self.names, rotation=0, ha="center", fontsize=10)
        axis.tick_params(axis="x", length=0, pad=8)
        if axis.get_legend():  # what is feasible: below the names instead of beside the title
            axis.legend(
                handles=axis.get_legend().legend_handles,
                labels=["feasible", "infeasible"],
                loc="upper left",
                bbox_to_anchor=(0, -0.14),
                ncols=2,
                frameon=False,
                fontsize=9,
            )
        for other in figure.axes:
            other.grid(False)
            _readable_decades(other.yaxis)
            for tick in (*other.get_yticklabels(which="major"), *other.get_yticklabels(which="minor")):
                tick.set(fontsize=8, bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6})


def _in_lines(name: str, width: int = 16) -> str:
    """A name in lines of about `width` characters, broken where words end."""
    lines = [""]
    for word in re.findall(r"[^ _.]+[ _.]*|[ _.]+", name):
        if lines[-1] and len(lines[-1] + word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines)


class Intermediate:
    """A line for each trial: the best thick, those that were pruned end in a cross.

    Args:
        words: what is reported.
        states: trial -> state. best: the best trial's number, if any.
    """

    def __init__(self, words: str, states: dict[int, TrialState], best: int | None) -> None:
        self.words, self.states, self.best = words, states, best

    def __call__(self, figure: Any, axis: Any) -> None:
        from matplotlib.lines import Line2D

        figure.set_size_inches(9, 5)
        axis.set(xlabel="epoch", ylabel=self.words)
        _whole_numbers(axis)
        looks: dict[str, dict[str, Any]] = {
            "finished": {"color": "tab:blue", "alpha": 0.5, "linewidth": 1, "marker": ""},
            "running": {"color": "tab:green", "alpha": 0.9, "linewidth": 1.2, "marker": "."},
            "pruned": {"color": "tab:red", "alpha": 0.5, "linewidth": 0.9, "marker": "x", "markersize": 5},
            f"best, trial {self.best}": {"color": "black", "alpha": 1, "linewidth": 2.2, "marker": "", "zorder": 5},
        }
        seen = set()
        for line in list(axis.lines):
            number = int(line.get_label().removeprefix("Trial"))
            state = self.states[number]
            if number == self.best:
                kind = f"best, trial {number}"
            else:
                names = {TrialState.PRUNED: "pruned", TrialState.RUNNING: "running"}
                kind = names.get(state, "finished")
            line.set(**looks[kind])
            if len(line.get_xdata()) == 1:
                line.set(marker="x" if kind == "pruned" else "o", markersize=5)
            if kind == "pruned":
                line.set_markevery([len(line.get_xdata()) - 1])
            seen.add(kind)
        handles = [Line2D([], [], label=kind, **look) for kind, look in looks.items() if kind in seen]
        if axis.get_legend():
            axis.get_legend().remove()
        axis.legend(handles=handles, loc="lower right", fontsize=9)


def pareto(figure: Any, axis: Any) -> None:
    figure.set_size_inches(8, 5.5)
    if axis.get_legend():
        words = {"Best Trial": "on the front", "Trial": "dominated", "Feasible Trial": "dominated"}
        for text in axis.get_legend().get_texts():
            text.set_text(words.get(text.get_text(), "infeasible"))
