"""A study as users read it: table, terminal, the note of the sweep's run, pictures, and one HTML page."""

import html
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import pandas as pd
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL, make_url

from pipeline import escape, urls
from pipeline.reporting import pages, tables
from pipeline.sweep.space.space import SweepConfig
from pipeline.sweep.study import retry
from pipeline.sweep.study.front import feasible, front
from pipeline.sweep.study.plots import Picture, draw, label, short_names, steps
from pipeline.sweep.study.stopping import stopped

TOP = 10
ORDER = ("complete", "infeasible", "pruned", "running", "waiting", "failed", "retried")
"""States in the order of the table."""
EXPLAINED = (
    "infeasible: finished, but beyond a constraint. retried: its worker died or was stopped, and a later trial "
    "continues it. last: the value reported in the last epoch or seed that it reached. attempts: how often it was "
    "started. seconds: of training, without evaluation. std: standard deviation over the seeds."
)


def write(study: optuna.Study, folder: Path, sweep: SweepConfig) -> list[Path]:
    """`trials.csv`, a PNG for each picture that can be drawn, and `study.html` in `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = table(study, sweep)
    paths = [folder / "trials.csv"]
    tables.write_csv(found, paths[0], index=False)
    pictures = list(draw(study, sweep))
    for picture in pictures:
        paths.append(folder / f"{picture.name}.png")
        paths[-1].write_bytes(picture.png)
    paths.append(folder / "study.html")
    paths[-1].write_text(page(study, sweep, found, pictures), encoding="utf-8")
    return paths


# the table -----------------------------------------------------------------------------------------------------------


def table(study: optuna.Study, sweep: SweepConfig) -> pd.DataFrame:
    """A row for each trial: with one objective the best first, with several the Pareto front first; then by state.

    Columns: number, state (one of `ORDER`), a column for each objective (finished trials only; with several seeds also
    its standard deviation over them, `<metric> std`), `last` (the value that was last reported while it ran), a column
    for each key of the space, epochs, or seeds if there are several (how many were reached), attempts, seconds, run_id
    (of the trial that it repeats, where it does), same_as (the number of that trial).
    """
    trials = study.get_trials(deepcopy=False)
    replaced = retry.replaced(trials)
    best = {t.number for t in front(study)}
    by_number = {t.number: t for t in trials}
    metrics = [o.metric for o in sweep.objectives]

    def place(row: dict[str, Any]) -> tuple[int, bool, float, int]:
        value = math.nan if len(metrics) > 1 else row[metrics[0]]  # members of the front are equally good
        cost = math.inf if math.isnan(value) else -value if study.direction == StudyDirection.MAXIMIZE else value
        return ORDER.index(row["state"]), row["number"] not in best, cost, row["number"]

    rows = [_row(trial, sweep, by_number, trial.number in replaced) for trial in trials]
    unit = steps(sweep)
    columns = ["number", "state", *metrics, *_spreads(sweep), "last", *sweep.space, unit, "attempts", "seconds"]
    found = pd.DataFrame(sorted(rows, key=place), columns=[*columns, "run_id", "same_as"])
    return found.astype({"number": "int64", unit: "int64", "attempts": "int64", "same_as": "Int64"})


def _spreads(sweep: SweepConfig) -> list[str]:
    """Columns of the objectives' standard deviations over seeds."""
    return [f"{o.metric} std" for o in sweep.objectives] if sweep.seeds > 1 else []


def _row(trial: FrozenTrial, sweep: SweepConfig, by_number: dict[int, FrozenTrial], replaced: bool) -> dict[str, Any]:
    attrs, reported = trial.user_attrs, trial.intermediate_values
    done = trial.state == TrialState.COMPLETE
    state = "retried" if replaced else retry.STATES[trial.state]
    same_as = attrs.get("same_as", attrs.get("asib.repeats"))
    source = by_number.get(same_as, trial) if same_as is not None else trial
    values = trial.values if done else [math.nan] * len(sweep.objectives)
    return {
        "number": trial.number,
        "state": "infeasible" if done and not feasible(trial) else state,
        **{o.metric: value for o, value in zip(sweep.objectives, values, strict=True)},
        **{name: attrs.get(retry.STD, {}).get(name.removesuffix(" std"), math.nan) for name in _spreads(sweep)},
        "last": reported[max(reported)] if reported else math.nan,
        **{key: trial.params.get(key) for key in sweep.space},
        steps(sweep): max(reported) + 1 if reported else 0,
        "attempts": len(retry.history(trial)) + (trial.state != TrialState.WAITING),
        "seconds": math.nan if attrs.get("seconds") is None else float(attrs["seconds"]),
        "run_id": attrs.get("run_id") or source.user_attrs.get("run_id") or "",
        "same_as": same_as,
    }


# texts ---------------------------------------------------------------------------------------------------------------


def _number(value: Any) -> str:
    """A number in four digits; whole and large numbers in full; empty if it is missing."""
    if isinstance(value, bool | str):
        return str(value)
    if value is None or pd.isna(value):
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or 1e3 <= abs(value) < math.inf else f"{value:.4g}"


def _values(trial: FrozenTrial, sweep: SweepConfig) -> str:
    spread = {name: f" ± {_number(value)}" for name, value in trial.user_attrs.get(retry.STD, {}).items()}
    pairs = zip(sweep.objectives, trial.values, strict=True)
    return ", ".join(f"{o.metric} {_number(v)}{spread.get(o.metric, '')}" for o, v in pairs)


def _counted(study: optuna.Study, sweep: SweepConfig) -> str:
    """`30 of 30 trials: 12 complete, 17 pruned, 1 failed (2 retried)`, and why the study has stopped, if it has."""
    counts = retry.count(study.get_trials(deepcopy=False))
    words = ", ".join(f"{n} {name}" for name, n in asdict(counts).items() if n and name != "retried") or "none yet"
    again = f" ({counts.retried} retried)" if counts.retried else ""
    why = stopped(study, sweep)
    return f"{counts.used} of {sweep.trials} trials: {words}{again}" + (f"; stopped: {why}" if why else "")


def text(study: optuna.Study, sweep: SweepConfig) -> str:
    """For the terminal: counts, the best value and its parameters; with several objectives the Pareto front."""
    lines = [f"{sweep.name}: {_counted(study, sweep)}"]
    best = front(study)
    if not best:
        return "\n".join([*lines, "no trial has finished within the constraints"])
    if len(sweep.objectives) == 1:
        width = max(map(len, best[0].params), default=0)
        lines.append(f"best: {_values(best[0], sweep)} (trial {best[0].number})")
        lines += [f"  {key:<{width}}  {_number(value)}" for key, value in best[0].params.items()]
        return "\n".join(lines)
    lines.append(f"Pareto front, {len(best)} trials:")
    lines += [f"  trial {t.number}: {_values(t, sweep)}" for t in best[:TOP]]
    return "\n".join([*lines, *(["  …"] if len(best) > TOP else [])])


def dashboard(storage: str) -> str:
    """The command that opens optuna-dashboard on a database, without passwords: PGPASSWORD or ~/.pgpass has them."""
    url = make_url(storage).difference_update_query(["password", "sslpassword"])
    shown = URL.create(url.drivername, url.username, None, url.host, url.port, url.database, url.query)
    return f"optuna-dashboard {shlex.quote(shown.render_as_string(hide_password=False))}"


def note(
    study: optuna.Study, sweep: SweepConfig, *, storage: str, experiment: str = "", parent: str = "", repeat: str = ""
) -> str:
    """Markdown for `mlflow.note.content`, never longer than a tag may be.

    Args:
        experiment: id of the MLflow experiment; without it runs are named but not linked.
        storage: URL of the study's database, for optuna-dashboard; its password is not shown.
        parent: id of the sweep's run, for the command that repeats the best trial.
        repeat: the line that repeats the sweep.
    """
    best, single = front(study), len(sweep.objectives) == 1
    parts = [f"**{escape.markdown(sweep.name)}**: {_counted(study, sweep)}"]
    if best and single:
        parts.append(f"**best: {escape.markdown(_values(best[0], sweep))}**, trial {best[0].number}")
        params = best[0].params.items()
        parts.append("\n".join(f"- {escape.code(key)}: {escape.markdown(_number(value))}" for key, value in params))
        if parent:
            parts.append("again: " + escape.code(f"mlflow run . -e distill -P cfg=runs:/{parent}/best.yaml"))
    elif best:
        parts.append(f"**{len(best)} trials on the Pareto front**")
    parts[2:2] = [repeat] if repeat else []
    found = table(study, sweep)
    found = found[found["state"] == "complete"]
    tail = f"all trials: {escape.code(dashboard(storage))}, and `study/study.html` among the artifacts"
    shorter = (found.head(rows) for rows in range(min(TOP, len(found)), -1, -1))
    middles = ([_markdown(rows, sweep, experiment)] if len(rows) else [] for rows in shorter)
    return pages.first_that_fits([*("\n\n".join([*parts, *middle, tail]) for middle in middles), parts[0]])


def _markdown(found: pd.DataFrame, sweep: SweepConfig, experiment: str) -> str:
    """The rows as a Markdown table; keys by their short names, trials as links to their runs."""
    names = short_names(list(sweep.space))
    metrics = [o.metric for o in sweep.objectives]
    head = ["trial", *map(escape.markdown, metrics), *(escape.code(names[key]) for key in sweep.space)]
    head += [steps(sweep), "attempts", "seconds"]
    lines = []
    for row in found.to_dict("records"):
        run = quote(str(row["run_id"]), safe="")  # from the study's database, where others write too
        trial = f"[{row['number']}]({urls.run_page(experiment, run)})" if experiment and run else f"{row['number']}"
        cells = [*metrics, *sweep.space, steps(sweep), "attempts", "seconds"]
        lines.append([trial, *(escape.markdown(_number(row[str(name)])) for name in cells)])
    return tables.markdown(head, lines, left=0)


# the page ------------------------------------------------------------------------------------------------------------


def page(study: optuna.Study, sweep: SweepConfig, found: pd.DataFrame, pictures: Sequence[Picture]) -> str:
    """One HTML file that needs no other and no network."""
    parts = [f"<pre>{html.escape(text(study, sweep))}</pre>"]
    for picture in pictures:
        parts += [f"<h2>{html.escape(picture.title)}</h2>", pages.image(picture.png, picture.title)]
    parts += ["<h2>trials</h2>", pages.table(found.astype(object).map(_number)), f"<p>{html.escape(EXPLAINED)}</p>"]
    return pages.page(f"{sweep.name}: {', '.join(label(o.metric) for o in sweep.objectives)}", parts)
