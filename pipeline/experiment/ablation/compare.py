"""Comparing runs: grouped by rung (or configuration), against the parent rung and L0, with intervals and costs."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from pipeline.config.identity import canonical
from pipeline.errors import UserError
from pipeline.experiment.ablation import rungs, statistics
from pipeline.experiment.ablation.statistics import Interval
from pipeline.experiment.records import Record

ACCURACY, VALIDATION = "final/acc_val_selected", "final/val_acc"
BEST = (ACCURACY, VALIDATION, "final/acc_last")
BASELINE = "l0_baseline"
NOT_COMPARED = ("seed", "rung", "run_name", "resume", "log_model", "register", "output_dir", "tracking.", "threads",
                "debug")  # fmt: skip
"""Keys, and prefixes, in which runs of one group may differ: they do not change what is computed."""
UPDATES = {"student updates": "cost/updates/b", "fusion updates": "cost/updates/a"}
REFERENCES = {"final/teacher_avg_acc": "teachers averaged", "final/synergy_acc": "synergy"}


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, one for each seed, in the seeds' order."""

    name: str
    records: tuple[Record, ...]

    @property
    def rung(self) -> rungs.Rung | None:
        return rungs.RUNGS.get(self.records[0].rung or "")

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(r.seed for r in self.records)

    def values(self, metric: str) -> list[float]:
        """Of the runs that have the metric."""
        return [r.metrics[metric] for r in self.records if metric in r.metrics]

    def mean(self, metric: str) -> float:
        values = self.values(metric)
        return float(np.mean(values)) if values else math.nan

    def std(self, metric: str) -> float:
        """Over seeds, with n - 1; NaN for one seed."""
        values = self.values(metric)
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    @property
    def validation(self) -> float | None:
        values = self.values(VALIDATION)
        return float(np.mean(values)) if len(values) == len(self.records) else None


@dataclass(frozen=True)
class Comparison:
    """Groups in order. `table`: a row for each; `differing`: configuration keys (rows) that differ between groups."""

    groups: tuple[Group, ...]
    table: pd.DataFrame
    differing: pd.DataFrame
    dataset: str
    notes: tuple[str, ...] = field(default_factory=tuple)

    def best(self) -> tuple[Group, Record] | None:
        """The group with the highest mean validation accuracy and its best run; None without a validation split."""
        known = [(g.validation, g) for g in self.groups if g.validation is not None]
        if not known:
            return None
        group = max(known, key=lambda pair: pair[0])[1]
        return group, max(group.records, key=lambda r: r.metrics[VALIDATION])

    def references(self) -> dict[str, float]:
        """Lines to compare with: mean test top-1 of each teacher, of their average, of the synergy."""
        every = [r for g in self.groups for r in g.records]
        names = sorted({k for r in every for k in r.metrics if k.startswith("final/teacher_") and k[14:-4].isdecimal()})
        found = {}
        for key in [*names, *REFERENCES]:
            values = [r.metrics[key] for r in every if key in r.metrics]
            if values:
                found[REFERENCES.get(key, f"teacher {key[14:-4]}")] = float(np.mean(values))
        return found


def compare(runs: Sequence[Record]) -> Comparison:
    """Group the runs and compare the groups.

    Raises:
        UserError: runs that are not finished or have no student's accuracy, of different data or classes.
    """
    _refuse(runs)
    groups = group(runs)
    dataset = runs[0].config.get("dataset.name", "")
    notes = []
    if dataset == "cifar100_sample":
        notes.append("smoke test: cannot rank methods")
    if min(len(g.records) for g in groups) == 1:
        notes.append("intervals of groups with one common seed cover the images only, not other seeds")
    names = {g.name for g in groups}
    if "l2_cccp" in names and "l2_control" not in names:
        notes.append("l2_cccp is to be read beside l2_control, which is not among these runs")
    if any(r.correct is None for r in runs):
        notes.append("runs without predictions.npz have no intervals")
    return Comparison(tuple(groups), _table(groups), _differing(groups), dataset, tuple(notes))


def _refuse(runs: Sequence[Record]) -> None:
    if not runs:
        raise UserError("there is nothing to compare: no finished distillation among these runs")
    for run in runs:
        if run.status != "FINISHED":
            raise UserError(f"run {run.name} ({run.id}) is {run.status}: only finished runs are compared")
        if ACCURACY not in run.metrics:
            step = run.tags.get("asib.step", "unknown")
            raise UserError(f"run {run.name} ({run.id}) of step {step} has no {ACCURACY}: compare distillations")
    first = runs[0]
    for run in runs[1:]:
        if None not in (run.classes, first.classes) and run.classes != first.classes:
            raise UserError(
                f"{first.name} ({first.id}) has {first.classes} classes and {run.name} ({run.id}) has {run.classes}: "
                "runs of different classes are not compared"
            )
        if run.digest != first.digest:
            raise UserError(
                f"{first.name} ({first.id}) is on data {first.digest[:12]} and {run.name} ({run.id}) on "
                f"{run.digest[:12]}: runs on different data are not compared"
            )


# groups --------------------------------------------------------------------------------------------------------------


def _compared(config: Mapping[str, str]) -> dict[str, str]:
    skipped = {k for k in config for n in NOT_COMPARED if k == n or (n[-1] == "." and k.startswith(n))}
    return {k: v for k, v in config.items() if k not in skipped}


def group(runs: Sequence[Record]) -> list[Group]:
    """By rung and configuration, seeds left out; rungs in the ladder's order, others as they come.

    Of runs that agree in all of it the last one counts.
    """
    found: dict[tuple[str, str], dict[int, Record]] = {}
    for run in runs:
        key = hashlib.sha256(canonical(_compared(run.config)).encode()).hexdigest()
        found.setdefault((run.rung or "", key), {})[run.seed] = run
    order = list(rungs.RUNGS)
    keys = sorted(found, key=lambda k: order.index(k[0]) if k[0] in order else len(order))
    counts: dict[str, int] = {}
    groups = []
    for rung, key in keys:
        records = tuple(record for _, record in sorted(found[rung, key].items()))
        name = rung or f"{records[0].tags.get('asib.step', 'run')} {records[0].tags.get('asib.config_hash', key)[:8]}"
        counts[name] = counts.get(name, 0) + 1
        groups.append(Group(name if counts[name] == 1 else f"{name} ({counts[name]})", records))
    return groups


def _differing(groups: Sequence[Group]) -> pd.DataFrame:
    configs = {g.name: _compared(g.records[0].config) for g in groups}
    keys = dict.fromkeys(key for values in configs.values() for key in values)
    rows = {key: {name: values.get(key, "") for name, values in configs.items()} for key in keys}
    kept = {key: row for key, row in rows.items() if len(set(row.values())) > 1}
    return pd.DataFrame.from_dict(kept, orient="index", columns=list(configs))


# the table -----------------------------------------------------------------------------------------------------------


def paired(one: Group, other: Group) -> tuple[Interval, int] | None:
    """Difference of test top-1 in points over the seeds that both have, with their number; None without any."""
    a, b = ({r.seed: r for r in g.records} for g in (one, other))
    seeds = sorted(a.keys() & b.keys())
    pairs = [(a[s].correct, b[s].correct) for s in seeds]
    if not pairs or any(x is None or y is None or len(x) != len(y) for x, y in pairs):
        return None
    left, right = (100.0 * np.stack([np.asarray(pair[k], dtype=np.float64) for pair in pairs]) for k in (0, 1))
    return statistics.difference(left, right), len(seeds)


def _against(groups: Iterable[Group], one: Group, other: str, column: str) -> dict[str, float]:
    nothing = {column: math.nan, f"{column} low": math.nan, f"{column} high": math.nan}
    found = next((g for g in groups if g.name == other), None)
    if found is None or found is one:
        return nothing
    interval = paired(one, found)
    if interval is None:
        return nothing | {column: one.mean(ACCURACY) - found.mean(ACCURACY)}
    return {column: interval[0].mean, f"{column} low": interval[0].low, f"{column} high": interval[0].high}


def _cost(one: Group, name: str) -> float:
    """Per run; 0 for what a run that counts its costs did not do."""
    return one.mean(name) if one.values(name) or not one.values("cost/seconds") else 0.0


def _table(groups: Sequence[Group]) -> pd.DataFrame:
    forwards = sorted({k for g in groups for r in g.records for k in r.metrics if k.startswith("cost/forward_images/")})
    # a rung's parent is the next rung below it that was run
    lowest = BASELINE if any(g.name == BASELINE for g in groups) else groups[0].name
    rows = []
    names = {g.name for g in groups}
    for one in groups:
        below = [rung.name for rung in rungs.lineage(one.rung.name)[:-1] if rung.name in names] if one.rung else []
        parent = below[-1] if below else ""
        row: dict[str, object] = {
            "group": one.name,
            "parent": parent,
            "seeds": len(one.records),
            "acc": one.mean(ACCURACY),
            "std": one.std(ACCURACY),
            "val_acc": one.mean(VALIDATION),
        }
        row |= _against(groups, one, parent, "vs parent")
        row |= _against(groups, one, lowest, f"vs {lowest}")
        row |= {column: _cost(one, name) for column, name in UPDATES.items()}
        row |= {f"images {name.rsplit('/', 1)[1]}": _cost(one, name) for name in forwards}
        row |= {"GMACs": one.mean("cost/gmacs"), "seconds": one.mean("cost/seconds")}
        rows.append(row)
    return pd.DataFrame(rows).set_index("group")
