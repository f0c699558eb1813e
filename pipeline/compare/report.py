"""A comparison as users read it: terminal, CSV, Markdown, LaTeX, one HTML page, the note of a parent run."""

import html
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from pipeline import escape, urls
from pipeline.compare import pictures
from pipeline.compare.compare import ACCURACY, AT_EQUAL_COST, Comparison
from pipeline.compare.pools import Group, names_of
from pipeline.reporting import pages, tables
from pipeline.reporting.statistics import ENOUGH
from pipeline.runs.run import Run

EXPLAINED = (
    "acc: test top-1 in % of the epoch that validation chose (the last one without validation), last: of the last "
    "epoch; mean over seeds, ± its standard deviation (n - 1). published: with the epoch that its source reports "
    "and, in brackets, the lowest and highest number that is known (conf/published.yaml). vs: "
    "difference in points on the seeds that both have, with the two-level (seed x image) bootstrap 95 % interval; with "
    "fewer than 5 seeds also Student's paired 95 % interval over the seeds (t), and both are indicative. p: two-sided, "
    "of the bootstrap, with 2 to 4 seeds of Student's paired test, after Holm for all comparisons of the table. "
    "at equal cost: against the baseline trained until it costs as many multiply-accumulates. "
    "updates, images (forward, training only), GMACs and seconds: per run; MACs count a training pass as three forward "
    "passes. Teachers' fine-tuning is shared and not counted."
)


def write(found: Comparison, folder: Path) -> list[Path]:
    """`comparison.csv`, `.md`, `.png`, `.html`, `.tex` and `cost.png` in `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"comparison.{kind}" for kind in ("csv", "md", "png", "html", "tex")] + [folder / "cost.png"]
    tables.write_csv(found.table, paths[0])
    paths[1].write_text(markdown(found))
    paths[2].write_bytes(image := pictures.accuracies(found))
    paths[5].write_bytes(costs := pictures.cost(found))
    paths[3].write_text(page(found, image, costs))
    paths[4].write_text(latex(found))
    return paths


def log(run: Run, found: Comparison, to: str) -> list[Path]:
    """Log a report to a run, whose note has its command and the link `to` (or none), and print it; its files."""
    paths = write(found, run.folder / "comparison")
    for path in paths:
        run.journal.artifact(path, "comparison")
    run.journal.tags({"mlflow.note.content": note(found, to, run.repeat)})
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
    columns["acc"] = list(map(with_deviation, table["acc"], table["std"]))
    if table["last"].notna().any():
        columns["last"] = list(map(with_deviation, table["last"], table["last_std"]))
    if table["published"].notna().any():
        columns["published"] = [_published(row) for _, row in table.iterrows()]
    columns["val acc"] = [
        _number(value, 2) + (" †" if marked else "")
        for value, marked in zip(table["val_acc"], table["val_contaminated"], strict=True)
    ]
    for name in ("synergy", "teachers"):
        if table[name].notna().any():
            columns[name] = [_number(value, 2) for value in table[name]]
    for name in _compared(table):
        columns[name] = [_with_interval(row, name) for _, row in table.iterrows()]
    for name in table.loc[:, "student updates":]:
        columns[name] = [_number(value, 1 if name == "seconds" else 0) for value in table[name]]
    return pd.DataFrame(columns, index=table.index)


def _compared(table: pd.DataFrame) -> list[str]:
    """The columns of differences that hold any."""
    names = [name.removesuffix(" t low") for name in table.columns if name.endswith(" t low")]
    return [name for name in names if table[name].notna().any()]


def with_deviation(mean: float, std: float) -> str:
    """`61.25 ± 0.40`; without the deviation, or empty, where it is not known."""
    return "" if math.isnan(mean) else f"{mean:.2f}" + ("" if math.isnan(std) else f" ± {std:.2f}")


def _published(row: "pd.Series[Any]") -> str:
    """`70.66 last [70.66, 71.54]`: a published number, its epoch and its band."""
    if math.isnan(float(row["published"])):
        return ""
    band = "" if row["band low"] == row["band high"] else f" [{row['band low']:.2f}, {row['band high']:.2f}]"
    return f"{row['published']:.2f} {row['published epoch']}{band}"


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:,.{digits}f}"


def _with_interval(row: "pd.Series[Any]", name: str) -> str:
    """`+2.67 [+1.10, +4.20] p 0.003`; with 2 to 4 seeds `+2.67 [+1.10, +4.20]; t [-0.40, +5.74] p 0.07, 3 seeds…`."""
    _, points, interval, student, p, seeds = difference_cells(row, name)
    if not interval:
        return points
    between = f"; t {student}" if student else ""  # p is Student's, too
    after = f"{',' if student else ';'} {seeds}" if "indicative" in seeds else ""
    return f"{points} {interval}{between} p {p}{after}"


def difference_cells(row: "pd.Series[Any]", name: str) -> tuple[str, str, str, str, str, str]:
    """What it is against, points, bootstrap interval, Student's interval, p, number of seeds; empty where unknown."""
    mean, low, high, p, seeds, t_low, t_high = (
        float(row[f"{name}{part}"]) for part in ("", " low", " high", " p", " seeds", " t low", " t high")
    )
    against = f"{name}, {row['epochs at equal cost']:.0f} epochs" if name == AT_EQUAL_COST else name
    if math.isnan(mean) or math.isnan(low):
        return against, "" if math.isnan(mean) else f"{mean:+.2f}", "", "", "", ""
    student = "" if math.isnan(t_low) else f"[{t_low:+.2f}, {t_high:+.2f}]"
    count = f"{seeds:.0f} seed{'' if seeds == 1 else 's'}" + (": indicative" if seeds < ENOUGH else "")
    shown = f"{p:.3f}" if p >= 0.0005 else "< 0.001"
    return against, f"{mean:+.2f}", f"[{low:+.2f}, {high:+.2f}]", student, shown, count


def _below(found: Comparison) -> list[str]:
    """The lines below the table: the teachers' accuracies, and what the intervals depend on."""
    references = ", ".join(f"{name} {value:.2f}" for name, value in found.references().items())
    said = [f"test top-1 in %: {references}"] if references else []
    return [*said, f"intervals and p: {found.conditions}"]


def matrix(found: Comparison) -> pd.DataFrame:
    """Methods by pairs: `71.20 ± 0.31 (3)`, with the number of seeds."""
    names = {pair: names_of(groups) for pair, groups in found.pairs.items()}
    rows = dict.fromkeys(name for of in names.values() for name in of.values())
    cells = {
        pair: {
            names[pair][g.name]: f"{with_deviation(g.mean(ACCURACY), g.std(ACCURACY))} ({len(g.records)})"
            for g in groups
        }
        for pair, groups in found.pairs.items()
    }
    return pd.DataFrame({pair: [of.get(row, "") for row in rows] for pair, of in cells.items()}, index=list(rows))


def text(found: Comparison) -> str:
    """For the terminal, at most 100 columns wide: accuracies, differences and costs, pair by pair."""
    parts = ["\n".join(textwrap.fill(line, tables.WIDTH) for line in [found.title, *found.notes])]
    if len(found.pairs) > 1:
        overall = matrix(found)
        rows = [[name, *cells] for name, cells in zip(overall.index, overall.to_numpy().tolist(), strict=True)]
        parts.append(tables.blocks("test top-1 in %", [["", *overall.columns], *rows]))
    for pair, groups in found.pairs.items():
        parts += _pair_text(found, pair, groups)
    parts.append("\n".join(textwrap.fill(line, tables.WIDTH) for line in _below(found)))
    return "\n\n".join(parts)


def _pair_text(found: Comparison, pair: str, groups: Sequence[Group]) -> list[str]:
    names = names_of(groups)
    table = found.table.loc[list(names)]
    all_shown = shown(found)
    rows = all_shown.loc[list(names)]
    before = all_shown.columns.get_loc("student updates")
    compared = _compared(table)
    title = pair if len(found.pairs) > 1 else "test top-1 in %"
    parts = []
    for heading, columns in (
        (title, [c for c in rows.columns[:before] if c not in (*compared, "pair", "parent")]),
        (f"{title}: cost of a run", list(rows.columns[before:])),
    ):
        cells = [[names[name], *rows.loc[name, columns]] for name in names]
        parts.append(tables.blocks(heading, [["", *columns], *cells]))
    differences = [
        [names[name], *difference_cells(table.loc[name], column)]
        for column in compared
        for name in names
        if not math.isnan(table.loc[name, column])
    ]
    if differences:
        head = ["", "against", "points", "95 %", "t 95 %", "p", "seeds"]
        kept = [k for k in range(len(head)) if any(row[k] for row in differences)]
        cells = [[row[k] for k in kept] for row in (head, *differences)]
        parts.insert(1, tables.blocks(f"{title}: differences", cells, left=2))
    return parts


def _markdown(table: pd.DataFrame, corner: str) -> str:
    rows = [[str(name), *map(str, row)] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    head, *rows = [list(map(escape.markdown, cells)) for cells in ([corner, *map(str, table.columns)], *rows)]
    return tables.markdown(head, rows)


def _corner(found: Comparison) -> str:
    """What the rows of a comparison are."""
    return "rung" if any(g.rung is not None for g in found.groups) else "method"


def _bold(lines: Sequence[str]) -> list[str]:
    return [f"**{escape.markdown(line)}**" for line in lines]


def markdown(found: Comparison) -> str:
    """The tables with their notes."""
    parts = [f"## {escape.markdown(found.title)}", *_bold(found.notes)]
    parts += [_markdown(matrix(found), "method")] if len(found.pairs) > 1 else []
    parts += [_markdown(shown(found), _corner(found))]
    parts += map(escape.markdown, _below(found))
    if len(found.differing):
        parts += ["### Keys that differ", _markdown(found.differing.T, _corner(found))]
    return "\n\n".join([*parts, EXPLAINED]) + "\n"


def latex(found: Comparison) -> str:
    """Methods by pairs, then each pair's rows; comments say what they are."""
    wanted = ("seeds", "acc", "last", "published", "GMACs")
    overall = matrix(found)
    parts = [_tabular(found.title, overall)]
    rows = shown(found)
    compared = _compared(found.table)
    for pair, groups in found.pairs.items():
        names = names_of(groups)
        table = rows.loc[list(names), [c for c in rows.columns if c in (*wanted, *compared)]].rename(index=names)
        parts.append(_tabular(pair, table))
    return "\n\n".join([*parts, *(f"% {escape.latex(line)}" for line in (*found.notes, *_below(found)))]) + "\n"


def _tabular(title: str, table: pd.DataFrame) -> str:
    rows = [[str(name), *map(str, cells)] for name, cells in zip(table.index, table.to_numpy(), strict=True)]
    head = ["", *map(str, table.columns)]
    return f"% {escape.latex(title)}\n{tables.latex(head, rows)}"


# MLflow --------------------------------------------------------------------------------------------------------------


def link(runs: Sequence[str], experiment: str) -> str:
    """MLflow's page that compares the runs, relative to whatever address the UI has."""
    lists = (json.dumps(values, separators=(",", ":")) for values in (list(runs), [experiment]))
    return "#/compare-runs?runs={}&experiments={}&{}".format(*(quote(text, safe="") for text in lists), urls.WORKFLOW)


def headline(found: Comparison) -> str:
    """Markdown: the group that is best on validation, and its difference from the baseline; empty if none is."""
    best = found.best()
    if best is None:
        return ""
    row, pair = found.table.loc[best[0].name], f" ({best[0].pair})" if len(found.pairs) > 1 else ""
    said = f"test top-1 of {best[0].name}{pair}" + (", the best on validation" if len(found.groups) > 1 else "")
    for name in _compared(found.table):
        _, points, interval, *_ = difference_cells(row, name)
        if points and name not in ("vs parent", AT_EQUAL_COST):
            said += "; " + " ".join(filter(None, [points, interval, name]))
    return f"**{with_deviation(row['acc'], row['std'])} %**: {escape.markdown(said)}"


def note(found: Comparison, to: str, repeat: str = "") -> str:
    """Markdown for `mlflow.note.content`: headline, link and `repeat` (or nothing), as much of the table as fits."""
    link = f"[**Compare these runs**]({to})" if to else ""
    first = "\n\n".join(filter(None, [headline(found), repeat, link]))
    narrow = shown(found)
    costs = list(narrow.columns).index("student updates")
    small = narrow.iloc[:, :costs].assign(seconds=narrow["seconds"])
    notes = (
        [first, *_bold(found.notes), _markdown(table, _corner(found)), *map(escape.markdown, _below(found))]
        for table in (narrow, small)
    )
    return pages.first_that_fits([*("\n\n".join(filter(None, parts)) for parts in notes), first])


# the page ------------------------------------------------------------------------------------------------------------


def page(found: Comparison, image: bytes, costs: bytes = b"") -> str:
    """One HTML file that needs no other: style and pictures are part of it."""
    parts = [
        *(f'<p class="note">{html.escape(line)}</p>' for line in found.notes),
        *([pages.table(matrix(found), "method")] if len(found.pairs) > 1 else []),
        pages.table(shown(found), _corner(found)),
        *(f"<p>{html.escape(line)}</p>" for line in _below(found)),
        f"<p>{pages.image(image, 'accuracies and curves of the table')}</p>",
        *([f"<p>{pages.image(costs, 'accuracy against cost')}</p>"] if costs else []),
    ]
    if len(found.differing):
        parts += ["<h2>Keys that differ</h2>", pages.table(found.differing.T, _corner(found))]
    parts += ["<h2>Runs</h2>", pages.table(_runs(found), "run"), f"<p>{html.escape(EXPLAINED)}</p>"]
    return pages.page(found.title, parts)


def _runs(found: Comparison) -> pd.DataFrame:
    rows = {
        r.id: {"group": g.name, "seed": r.seed, "acc": f"{r.metrics[ACCURACY]:.2f}", "name": r.name}
        for g in found.groups
        for r in g.records
    }
    return pd.DataFrame.from_dict(rows, orient="index")
