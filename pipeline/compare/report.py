"""A comparison as users read it: terminal, CSV, Markdown, a picture, one HTML page, and the note of a parent run."""

import html
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from pipeline import escape
from pipeline.compare.compare import ACCURACY, Comparison
from pipeline.compare.pools import Group
from pipeline.reporting import figures, pages, tables
from pipeline.reporting.statistics import ENOUGH
from pipeline.runs.run import Run

EXPLAINED = (
    "acc: test top-1 in % of the epoch that validation chose, mean over seeds, ± its standard deviation (n - 1). vs: "
    "difference in points on the seeds that both have, with the two-level (seed x image) bootstrap 95 % interval; with "
    "fewer than 5 seeds also Student's paired 95 % interval over the seeds (t), and both are indicative. p: two-sided, "
    "of the bootstrap, with 2 to 4 seeds of Student's paired test, after Holm for all comparisons of the table. "
    "updates, images (forward, training only), GMACs and seconds: per run; MACs count a training pass as three forward "
    "passes. Teachers' fine-tuning is shared and not counted."
)


def write(found: Comparison, folder: Path) -> list[Path]:
    """`comparison.csv`, `.md`, `.png` and `.html` in `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"comparison.{kind}" for kind in ("csv", "md", "png", "html")]
    tables.write_csv(found.table, paths[0])
    paths[1].write_text(markdown(found))
    paths[2].write_bytes(image := picture(found))
    paths[3].write_text(page(found, image))
    return paths


def log(run: Run, found: Comparison, to: str) -> list[Path]:
    """Log a report to a run, whose note has the link `to` (or none), and print it; its files."""
    paths = write(found, run.folder / "comparison")
    for path in paths:
        run.journal.artifact(path, "comparison")
    run.journal.tags({"mlflow.note.content": note(found, to)})
    print(text(found), flush=True)
    return paths


# tables --------------------------------------------------------------------------------------------------------------


def shown(found: Comparison) -> pd.DataFrame:
    """The table with its numbers as text: `61.25 ± 0.40`, `+0.80 [-0.10, 1.65]`, counts with thousands."""
    table, columns = found.table, dict[str, list[str]]()
    for name in ("pair", "parent"):
        if name in table and table[name].any():
            columns[name] = list(table[name])
    columns["seeds"] = [f"{n:.0f}" for n in table["seeds"]]
    columns["acc"] = [
        f"{mean:.2f}" + ("" if math.isnan(std) else f" ± {std:.2f}")
        for mean, std in zip(table["acc"], table["std"], strict=True)
    ]
    columns["val acc"] = [
        _number(value, 2) + (" †" if marked else "")
        for value, marked in zip(table["val_acc"], table["val_contaminated"], strict=True)
    ]
    if table["synergy"].notna().any():
        columns["synergy"] = [_number(value, 2) for value in table["synergy"]]
    for name in (c for c in table.columns if c.startswith("vs ") and f"{c} low" in table.columns):
        columns[name] = [_with_interval(row, name) for _, row in table.iterrows()]
    for name in table.loc[:, "student updates":]:
        columns[name] = [_number(value, 1 if name == "seconds" else 0) for value in table[name]]
    return pd.DataFrame(columns, index=table.index)


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:,.{digits}f}"


def _with_interval(row: "pd.Series[Any]", name: str) -> str:
    """`+2.67 [+1.10, +4.20] p 0.003`; with few seeds `; t [-0.40, +5.74], 3 seeds: indicative` too."""
    mean, low, high, p, seeds, t_low, t_high = (
        float(row[f"{name}{part}"]) for part in ("", " low", " high", " p", " seeds", " t low", " t high")
    )
    if math.isnan(mean):
        return ""
    if math.isnan(low):
        return f"{mean:+.2f}"
    text = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] p {p:.3f}"
    if seeds >= ENOUGH:
        return text
    student = "" if math.isnan(t_low) else f"t [{t_low:+.2f}, {t_high:+.2f}], "
    return f"{text}; {student}{seeds:.0f} seed{'' if seeds == 1 else 's'}: indicative"


def _title(found: Comparison) -> str:
    seeds = sorted({s for g in found.groups for s in g.seeds})
    return f"{found.dataset}: {len(found.groups)} configurations, seeds {', '.join(map(str, seeds))}"


def _below(found: Comparison) -> list[str]:
    """The lines below the table: the teachers' accuracies, and what the intervals depend on."""
    references = ", ".join(f"{name} {value:.2f}" for name, value in found.references().items())
    said = [f"test top-1 in %: {references}"] if references else []
    return [*said, f"intervals and p: {found.conditions}"]


def text(found: Comparison) -> str:
    """For the terminal."""
    title = _title(found)
    with pd.option_context("display.max_columns", None, "display.width", 10_000):
        lines = [title, "-" * len(title), *found.notes, shown(found).to_string(), *_below(found)]
    return "\n".join(lines)


def _markdown(table: pd.DataFrame, corner: str) -> str:
    rows = [[str(name), *map(str, row)] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    head, *rows = [list(map(escape.markdown, cells)) for cells in ([corner, *map(str, table.columns)], *rows)]
    return tables.markdown(head, rows)


def _bold(lines: Sequence[str]) -> list[str]:
    return [f"**{escape.markdown(line)}**" for line in lines]


def markdown(found: Comparison) -> str:
    """The tables with their notes."""
    parts = [f"## {escape.markdown(_title(found))}", *_bold(found.notes), _markdown(shown(found), "rung")]
    parts += map(escape.markdown, _below(found))
    if len(found.differing):
        parts += ["### Keys that differ", _markdown(found.differing.T, "rung")]
    return "\n\n".join([*parts, EXPLAINED]) + "\n"


# MLflow --------------------------------------------------------------------------------------------------------------


def link(runs: Sequence[str], experiment: str) -> str:
    """MLflow's page that compares the runs, relative to whatever address the UI has."""
    lists = (json.dumps(values, separators=(",", ":")) for values in (list(runs), [experiment]))
    return "#/compare-runs?runs={}&experiments={}".format(*(quote(text, safe="") for text in lists))


def note(found: Comparison, to: str) -> str:
    """Markdown for `mlflow.note.content`: the link (or nothing), and as much of the table as a tag holds."""
    first = f"[**Compare these runs**]({to})" if to else ""
    narrow = shown(found)
    costs = list(narrow.columns).index("student updates")
    small = narrow.iloc[:, :costs].assign(seconds=narrow["seconds"])
    notes = (
        [first, *_bold(found.notes), _markdown(table, "rung"), *map(escape.markdown, _below(found))]
        for table in (narrow, small)
    )
    return pages.first_that_fits([*("\n\n".join(filter(None, parts)) for parts in notes), first])


# the page ------------------------------------------------------------------------------------------------------------


def page(found: Comparison, image: bytes) -> str:
    """One HTML file that needs no other: style and picture are part of it."""
    parts = [
        *(f'<p class="note">{html.escape(line)}</p>' for line in found.notes),
        pages.table(shown(found), "rung"),
        *(f"<p>{html.escape(line)}</p>" for line in _below(found)),
        f"<p>{pages.image(image, 'bars and curves of the table')}</p>",
    ]
    if len(found.differing):
        parts += ["<h2>Keys that differ</h2>", pages.table(found.differing.T, "rung")]
    parts += ["<h2>Runs</h2>", pages.table(_runs(found), "run"), f"<p>{html.escape(EXPLAINED)}</p>"]
    return pages.page(_title(found), parts)


def _runs(found: Comparison) -> pd.DataFrame:
    rows = {
        r.id: {"group": g.name, "seed": r.seed, "acc": f"{r.metrics[ACCURACY]:.2f}", "name": r.name}
        for g in found.groups
        for r in g.records
    }
    return pd.DataFrame.from_dict(rows, orient="index")


# the picture ---------------------------------------------------------------------------------------------------------


def picture(found: Comparison) -> bytes:
    """PNG: test accuracy with error bars and reference lines, and the curves on the evaluation split."""
    made, axes = figures.figure(1, 3, 18, max(4.5, 0.34 * len(found.groups) + 1.5))
    palette = figures.pyplot().get_cmap("turbo")(np.linspace(0.05, 0.95, len(found.groups)))
    _bars(axes[0], found, palette)
    curves = (("student/acc", "student, per-epoch accuracy in %"), ("synergy/acc", "synergy, accuracy in %"))
    for axis, (metric, title) in zip(axes[1:], curves, strict=True):
        for group, colour in zip(found.groups, palette, strict=True):
            _curve(axis, group, metric, colour)
        axis.set(title=title, xlabel="epoch (A and B)")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    made.suptitle("; ".join([_title(found), *found.notes[:1]]), fontsize=10)
    return figures.png(made)


def _bars(axis: Any, found: Comparison, palette: Any) -> None:
    names = [f"{g.name} ({len(g.records)})" for g in found.groups]
    means = [g.mean(ACCURACY) for g in found.groups]
    deviations = [g.std(ACCURACY) for g in found.groups]  # NaN, and nothing drawn, for one seed
    places = np.arange(len(names))
    axis.barh(places, means, xerr=deviations, color=palette, alpha=0.85, capsize=3)
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    for number, (name, value) in enumerate(found.references().items()):
        style = ("-", "--", "-.", ":")[number % 4]
        axis.axvline(value, color="black", lw=1, ls=style, label=f"{name} {value:.1f}")
    low = min([*means, *found.references().values()])
    axis.set_xlim(left=max(0.0, low - 0.35 * (max([*means, *found.references().values()]) - low) - 3))
    axis.set(title="test top-1 in %: mean and standard deviation over seeds (number)")
    if found.references():
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4)
    axis.grid(alpha=0.3, axis="x")


def _curve(axis: Any, group: Group, metric: str, colour: Any) -> None:
    """The mean over seeds, with the range between the lowest and the highest seed."""
    points: dict[int, list[float]] = defaultdict(list)
    for record in group.records:
        for step, value in record.histories.get(metric, []):
            points[step].append(value)
    if not points:
        return
    steps = sorted(points)
    axis.plot(steps, [float(np.mean(points[s])) for s in steps], color=colour, marker=".", ms=4, label=group.name)
    if len(group.records) > 1:
        low, high = ([pick(points[s]) for s in steps] for pick in (min, max))
        axis.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
