"""The pictures of a comparison: accuracies and curves, and accuracy against cost."""

import math
import textwrap
from collections import defaultdict
from typing import Any

import numpy as np

from pipeline.compare.compare import ACCURACY, Comparison
from pipeline.compare.pools import GMACS, Group, names_of
from pipeline.reporting import figures, statistics

CURVES = {
    "student/acc": "student, per-epoch accuracy in %",
    "synergy/acc": "synergy, accuracy in %",
    "b_step/target_entropy": "entropy of the target in nats",
}
"""Curves of the picture, where any run has them (docs/tracking.md), and their titles."""


def accuracies(found: Comparison) -> bytes:
    """PNG: test accuracy with error bars and reference lines, and the curves on the evaluation split."""
    from matplotlib import colormaps  # late, like all of matplotlib

    known = {metric for group in found.groups for record in group.records for metric in record.histories}
    curves = {metric: title for metric, title in CURVES.items() if metric in known}
    lines = math.ceil((1 + len(curves)) / 2)
    made, axes = figures.figure(lines, 2, 14, lines * max(4.5, 0.34 * len(found.groups) + 1.5), squeeze=False)
    axes = axes.ravel()
    palette = colormaps["turbo"](np.linspace(0.05, 0.95, len(found.groups)))
    _means(axes[0], found, palette)
    for axis, (metric, title) in zip(axes[1:], curves.items(), strict=False):
        for group, colour in zip(found.groups, palette, strict=True):
            _curve(axis, group, metric, colour)
        axis.set(title=title, xlabel="student epochs")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    for axis in axes[1 + len(curves) :]:
        axis.set_axis_off()
    _head(made, found)
    return figures.png(made)


def cost(found: Comparison) -> bytes:
    """PNG: each pair's test accuracy against the cost of a run, with two-level 95 % intervals of the mean."""
    columns = min(3, len(found.pairs))
    lines = math.ceil(len(found.pairs) / columns)
    made, axes = figures.figure(lines, columns, 6.5 * columns, 4.8 * lines, squeeze=False)
    for axis, (pair, groups) in zip(axes.flat, found.pairs.items(), strict=False):
        ranked = sorted((g for g in groups if g.values(GMACS)), key=lambda group: group.mean(ACCURACY))
        points = [(group, group.mean(GMACS), group.mean(ACCURACY), *_ends(group)) for group in ranked]
        width = 0.04 * max((cost for _, cost, *_ in points), default=0.0)
        line = 0.05 * (max((p[4] for p in points), default=0.0) - min((p[3] for p in points), default=0.0))
        names = names_of(groups)
        placed: list[tuple[float, int, float]] = []
        for group, cost, mean, low, high in points:
            axis.errorbar(cost, mean, yerr=[[mean - low], [high - mean]], marker="o", capsize=3, ls="")
            # of those that cost about the same, every other name stands on the left, and above the one below it
            left = [g for g, at, *_ in points if abs(at - cost) <= width].index(group) % 2
            under = [height + line for at, side, height in placed if side == left and abs(at - cost) <= width]
            placed.append((cost, left, max([mean, *under])))
            axis.annotate(
                f"{names[group.name]} ({len(group.records)})",
                (cost, placed[-1][2]),
                xytext=(-6 if left else 6, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                fontsize=8,
                annotation_clip=False,
            )
        axis.set(title=pair, xlabel="10⁹ multiply-accumulates of a run", ylabel="test top-1 in %")
        axis.margins(x=0.3)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(found.pairs) :]:
        axis.set_axis_off()
    _head(made, found)
    return figures.png(made)


def _ends(group: Group) -> tuple[float, float]:
    """The two-level 95 % interval around the mean accuracy; the mean twice where answers to images are not known."""
    mean, known = group.mean(ACCURACY), [r.correct for r in group.records if r.correct is not None]
    if len({len(correct) for correct in known}) != 1:
        return mean, mean
    _, low, high = statistics.interval(100.0 * np.stack(known).astype(np.float64))
    return min(mean, low), max(mean, high)


def _head(made: Any, found: Comparison) -> None:
    """The title and the first note, in lines that the picture has room for."""
    text = "; ".join([found.title, *found.notes[:1]])
    made.suptitle(textwrap.fill(text, int(12 * made.get_size_inches()[0])), fontsize=10)


def _means(axis: Any, found: Comparison, palette: Any) -> None:
    names = [f"{g.name} ({len(g.records)})" for g in found.groups]
    means = [g.mean(ACCURACY) for g in found.groups]
    deviations = [g.std(ACCURACY) for g in found.groups]  # NaN, and nothing drawn, for one seed
    places = np.arange(len(names))
    for place, mean, deviation, colour in zip(places, means, deviations, palette, strict=True):
        axis.errorbar(mean, place, xerr=deviation, fmt="o", color=colour, capsize=3)
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    for number, (name, value) in enumerate(found.references().items()):
        style = ("-", "--", "-.", ":")[number % 4]
        axis.axvline(value, color="black", lw=1, ls=style, label=f"{name} {value:.1f}")
    axis.set(title="test top-1 in %: mean and standard deviation over seeds (number)")
    if found.references():
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4)
    axis.grid(alpha=0.3, axis="x")


def _curve(axis: Any, group: Group, metric: str, colour: Any) -> None:
    """The mean over seeds, with the range between the lowest and the highest seed."""
    points: dict[float, list[float]] = defaultdict(list)
    for record in group.records:
        history, student = record.histories.get(metric, []), record.histories.get("student/acc", [])
        places = figures.student_epochs([step for step, _ in history], [step for step, _ in student])
        for epoch, (_, value) in zip(places, history, strict=True):
            points[epoch].append(value)
    if not points:
        return
    epochs = sorted(points)
    axis.plot(epochs, [float(np.mean(points[e])) for e in epochs], color=colour, marker=".", ms=4, label=group.name)
    if len(group.records) > 1:
        low, high = ([pick(points[e]) for e in epochs] for pick in (min, max))
        axis.fill_between(epochs, low, high, color=colour, alpha=0.12, lw=0)
