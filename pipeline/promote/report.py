"""A verdict as users read it: terminal, note of the run, MLflow table, picture of the paired differences."""

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline import escape
from pipeline.promote import spending
from pipeline.promote.criteria import Gate
from pipeline.promote.gate import Criterion, Ints, Verdict, class_accuracies
from pipeline.reporting import figures, statistics, tables
from pipeline.reporting.statistics import Bools

TABLE, PICTURE, PAIRED = "verdict.json", "differences.png", "paired.parquet"
COLUMNS = ("criterion", "value", "limit", "verdict", "note")


def rows(verdict: Verdict) -> list[tuple[str, ...]]:
    """A row of `COLUMNS` for each criterion, as texts."""
    return [
        (c.name, _number(c.value, c.unit), _limit(c), "passed" if c.passed else "REFUSED", c.note)
        for c in verdict.criteria
    ]


def _limit(criterion: Criterion) -> str:
    words = "at least" if criterion.at_least else "at most"
    if criterion.name == "improvement" and criterion.limit == 0:
        words = "above"  # equally good is no improvement
    return f"{words} {_number(criterion.limit, criterion.unit)}"


def _number(value: float, unit: str) -> str:
    match unit:
        case "points":
            return f"{value:+.2f} points"
        case "%":
            return f"{value:.2f} %"
        case "x" | "ms":
            return f"{value:.2f} {unit}"
        case "p":
            return f"p = {value:.3g}"
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.4f}"


def sentence(verdict: Verdict) -> str:
    """Why it was promoted or refused, in one line."""
    if verdict.passed:
        n = len(verdict.criteria)
        return f"all {n} criteria hold" if n > 1 else "the only criterion holds"
    return "; ".join(
        f"{c.name} {_number(c.value, c.unit)} ({'; '.join(filter(None, [_limit(c), c.note]))})" for c in verdict.failed
    )


def looks(verdict: Verdict, gate: Gate) -> str:
    """How often these test images were used, and what that demands of this challenger; empty without a champion."""
    if "promotion/look" not in verdict.numbers:
        return ""
    k, images = int(verdict.numbers["promotion/look"]), int(verdict.numbers["promotion/images"])
    text = f"look {k} at these {images:,} test images"
    if gate.alpha is None or not gate.alpha_spending:
        return f"{text}, for which alpha is not adjusted"
    level = verdict.numbers["promotion/alpha"]
    differing = int(verdict.numbers["promotion/challenger_only"] + verdict.numbers["promotion/champion_only"])
    ahead = spending.needed(differing, level)
    enough = f"at least {ahead} ahead" if ahead else "none is far enough ahead"
    return f"{text}: of alpha {gate.alpha:g} it gets {level:.2g} ({enough} on the {differing:,} where the two differ)"


def warning(verdict: Verdict, gate: Gate) -> str:
    """A warning about a test set that is used up; empty otherwise."""
    k = int(verdict.numbers.get("promotion/look", 0))
    if gate.alpha is None or not spending.used_up(k):
        return ""
    left = (
        "what is left of alpha hardly lets anything pass" if gate.alpha_spending else "alpha is not adjusted for that"
    )
    return f"this test set is used up: it was looked at {k} times, and {left}; take images that nobody has seen"


def note(title: str, verdict: Verdict, conclusion: str, *remarks: str, repeat: str = "") -> str:
    """Markdown for the run's description, with the command that repeats it."""
    title, conclusion, *told = [escape.markdown(text) for text in (title, conclusion, *remarks)]  # with names in them
    table = tables.markdown(COLUMNS, [list(map(escape.markdown, row)) for row in rows(verdict)], left=len(COLUMNS))
    return "\n\n".join(filter(None, [f"**{conclusion}**", repeat, title, table, *told]))


def write(
    folder: Path, verdict: Verdict, gate: Gate, labels: Ints, classes: tuple[str, ...], sides: dict[str, Bools]
) -> list[Path]:
    """Write `verdict.json` (a table of MLflow's), `paired.parquet` and, for two versions, the picture.

    `sides`: `challenger` and, where there is one, `champion`: (n,) which images each classified correctly.
    """
    paths = [folder / TABLE, folder / PAIRED]
    tables.write_json(pd.DataFrame(rows(verdict), columns=list(COLUMNS)), paths[0])
    table = {"index": np.arange(len(labels)), "label": labels} | {f"{k}_correct": v for k, v in sides.items()}
    pd.DataFrame(table).to_parquet(paths[1], index=False)
    if "champion" in sides:
        paths.append(folder / PICTURE)
        _draw(paths[-1], gate, labels, classes, sides["challenger"], sides["champion"])
    return paths


def _draw(path: Path, gate: Gate, labels: Ints, classes: tuple[str, ...], challenger: Bools, champion: Bools) -> None:
    found = statistics.pairs(challenger, champion)
    made, (left, right) = figures.figure(1, 2, 13, min(max(4.0, 0.16 * len(classes)), 16))
    drawn = statistics.replicates_of_pairs(found, gate.replicates)
    # replicates are multiples of one image's weight: bins that cover unequal numbers of them would look like a comb
    width = 100.0 / found.images * max(1, int(np.ptp(drawn) * found.images / 100.0 / 50))
    edges = np.arange(drawn.min() - width / 2, drawn.max() + width, width)
    left.hist(drawn, bins=edges.tolist(), color="tab:blue", alpha=0.7)
    left.axvline(found.gain, color="black", label=f"measured: {found.gain:+.2f}")
    left.axvline(gate.min_improvement, color="tab:red", ls=":", label=f"asked for: {gate.min_improvement:+.2f}")
    if gate.interval is not None:
        low, high = statistics.percentiles(drawn, gate.interval)
        label = f"{100 * gate.interval:g} %: {low:+.2f}, {high:+.2f}"
        left.axvspan(low, high, color="tab:blue", alpha=0.15, label=label)
    alone = f"alone right: challenger {found.one_alone}, champion {found.other_alone}"
    left.set(
        xlabel="challenger - champion, points of test top-1",
        ylabel="bootstrap replicates",
        title=f"{alone}; p = {statistics.mcnemar(found):.3g}",
    )
    left.legend(fontsize=8)
    gains = class_accuracies(challenger, labels, len(classes))
    gains -= class_accuracies(champion, labels, len(classes))
    order = np.argsort(np.nan_to_num(gains))
    colors = ["tab:red" if gains[k] < 0 else "tab:green" for k in order]
    right.barh(range(len(classes)), np.nan_to_num(gains[order]), color=colors)
    if gate.max_class_drop is not None:
        right.axvline(-gate.max_class_drop, color="tab:red", ls=":", label=f"allowed: {-gate.max_class_drop:g}")
        right.legend(fontsize=8)
    right.set(xlabel="challenger - champion, points", title="by class")
    right.set_yticks(range(len(classes)), [classes[k] for k in order], fontsize=8 if len(classes) <= 40 else 5)
    figures.save(made, path)
