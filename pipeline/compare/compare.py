"""Comparing runs: grouped by rung (or configuration), against the parent rung and L0, with intervals and costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from pipeline.compare import pools, published
from pipeline.compare.pools import CODE, GMACS, NONE, SPLIT, TEACHERS, VALIDATION, Group, group
from pipeline.compose import rungs
from pipeline.config.words import suggestion
from pipeline.errors import UserError
from pipeline.reporting import statistics
from pipeline.reporting.statistics import Difference
from pipeline.runs.records import ALONE, Record

ACCURACY = "final/acc_val_selected"
LAST = "final/acc_last"
BEST = (ACCURACY, VALIDATION, LAST)
BASELINE = "l0_baseline"
AT_EQUAL_COST = "at equal cost"
UPDATES = {"student updates": "cost/updates/b", "fusion updates": "cost/updates/a"}


@dataclass(frozen=True)
class Comparison:
    """Groups in order. `table`: a row for each; `differing`: configuration keys (rows) that differ between groups."""

    groups: tuple[Group, ...]
    table: pd.DataFrame
    differing: pd.DataFrame
    dataset: str
    notes: tuple[str, ...] = ()

    @cached_property
    def pairs(self) -> dict[str, tuple[Group, ...]]:
        """Groups by pair, in order; a student alone belongs to every pair that it is part of.

        A pair is called `resnet56-resnet20`; with the hashes of the teachers' weights where that means several.
        """
        taught = {(g.facts[TEACHERS], g.student): g for g in self.groups if not g.alone}
        short = [published.pair(g.teachers, g.student) for g in taught.values()]
        found = {
            name if short.count(name) == 1 else one.pair: tuple(
                g for g in self.groups if (g.alone or g.facts[TEACHERS] == teachers) and g.student == student
            )
            for ((teachers, student), one), name in zip(taught.items(), short, strict=True)
        }
        rest = [g for g in self.groups if g.student not in {student for _, student in taught}]
        return found | {s: tuple(g for g in rest if g.student == s) for s in dict.fromkeys(g.student for g in rest)}

    @property
    def title(self) -> str:
        seeds = sorted({s for g in self.groups for s in g.seeds})
        return f"{self.dataset}: {len(self.groups)} configurations, seeds {', '.join(map(str, seeds))}"

    def best(self) -> tuple[Group, Record] | None:
        """The group with the highest mean validation accuracy and its best run; None without a validation split."""
        known = [g for g in self.groups if g.validation is not None]
        if not known:
            return None
        group = max(known, key=lambda g: g.mean(VALIDATION))
        return group, max(group.records, key=lambda r: r.metrics[VALIDATION])

    def references(self) -> dict[str, float]:
        """Lines to compare with: mean test top-1 of each teacher and of their average, for each set of teachers.

        A number is a mean over runs that agree in what determines it: the teachers' weights, which fine-tuning in
        A-steps changes from run to run, and for the average `teacher_weights`. (The synergy's depends on the
        configuration, so it is in the table.)
        """
        found: dict[tuple[str, str], list[float]] = {}
        for one in self.groups:
            made_by = ",".join(h[:6] for h in one.facts[TEACHERS].split(","))
            if one.facts.get("method.use_teacher_finetuning") == "true":
                made_by += f", {one.name}"
            for key in {k for r in one.records for k in r.metrics if k.startswith("final/teacher_")}:
                name, of = f"teacher {key[14:-4]}", made_by
                if key == "final/teacher_avg_acc":
                    weights = one.facts.get("method.teacher_weights", "equal")
                    name, of = "teachers averaged", made_by if weights == "equal" else f"{made_by}, {weights}"
                found.setdefault((name, of), []).extend(one.values(key))
        names = [name for name, _ in found]
        order = sorted(found, key=lambda k: (k[0] == "teachers averaged", k))
        return {
            f"{name} ({of})" if names.count(name) > 1 else name: float(np.mean(found[name, of])) for name, of in order
        }

    @property
    def conditions(self) -> str:
        """What the intervals and p values are conditional on."""
        sets = dict.fromkeys(g.facts[TEACHERS] for g in self.groups if g.facts[TEACHERS] not in ("", NONE))
        hashes = "; ".join(" + ".join(h[:12] for h in names.split(",")) for names in sets)
        parts = [f"these teachers ({hashes})"] if hashes else []
        splits = {tuple(g.facts.get(key, "?") for key in SPLIT) for g in self.groups}
        shown = "; ".join(f"val_fraction {f}, split_seed {s}" for f, s in sorted(splits))
        return "conditional on " + ", ".join([*parts, f"this data and split ({shown})", "this recipe"])


def compare(runs: Sequence[Record], anyway: bool = False, baseline: str | None = None) -> Comparison:
    """Group the runs and compare the groups.

    Args:
        anyway: even if teachers, student, epochs, data or split differ.
        baseline: the rung or method that every other one is compared with; by default the lowest rung, or the first.

    Raises:
        UserError: runs that are unfinished, lack a student's accuracy or differ in their classes; an unfair
            comparison; no such baseline.
    """
    _refuse(runs, anyway)
    groups = group(runs)
    baseline = _baseline(groups, baseline)
    dataset = runs[0].config.get("dataset.name", "")
    notes = []
    if dataset == "cifar100_sample":
        notes.append("smoke test: cannot rank methods")
    table, beside = _table(groups, anyway, baseline)
    notes += [*_code(groups), *beside]
    if min(len(g.records) for g in groups) == 1:
        notes.append("where only one seed is compared, intervals cover the choice of test images, not that of the seed")
    names = {g.name for g in groups}
    if "l2_cccp" in names and "l2_control" not in names:
        notes.append("l2_cccp is to be read with l2_control, which is not among these runs")
    if any(r.correct is None for r in runs):
        notes.append("runs without predictions.npz have no intervals")
    if any(g.contaminated for g in groups):
        notes.append("† teachers may have seen the validation images: val acc, and what was chosen by it, is too good")
    return Comparison(tuple(groups), table, _differing(groups), dataset, tuple(notes))


def _baseline(groups: Sequence[Group], given: str | None) -> str:
    """The baseline's label, or its name where one label is all that there is. Raises UserError: no such one."""
    if given is not None:
        if not any(g.called(given) for g in groups):
            labels = list(dict.fromkeys(g.label for g in groups))
            hint = suggestion(given, labels)
            raise UserError(f"baseline={given}: none of these runs; {hint}there are {', '.join(labels)}")
        return given
    first = groups[0]
    if any(g.rung is not None and g.label == BASELINE for g in groups):
        return BASELINE
    return first.name if all(g.label == first.label for g in groups) else first.label


def _code(groups: Sequence[Group]) -> list[str]:
    """A note if different versions of the sources made the runs."""
    by: dict[str, list[str]] = {}
    for one in groups:
        by.setdefault(one.facts[CODE] or "unknown", []).append(one.name)
    if len(by) < 2:
        return []
    made = "; ".join(f"{code} made {', '.join(names)}" for code, names in by.items())
    return [f"runs of different code (a method's own files count): {made}"]


def _refuse(runs: Sequence[Record], anyway: bool) -> None:
    if not runs:
        raise UserError("nothing to compare: no finished distillation among these runs")
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
        if run.digest != first.digest and not anyway:
            raise UserError(
                f"{first.name} ({first.id}) is on data {first.digest[:12]} and {run.name} ({run.id}) on "
                f"{run.digest[:12]}: runs on different data are not compared unless anyway=true"
            )


# the table -----------------------------------------------------------------------------------------------------------


def _differing(groups: Sequence[Group]) -> pd.DataFrame:
    configs = {g.name: g.facts for g in groups}
    keys = dict.fromkeys(key for values in configs.values() for key in values)
    rows = {key: {name: values.get(key, "") for name, values in configs.items()} for key in keys}
    kept = {key: row for key, row in rows.items() if len(set(row.values())) > 1}
    return pd.DataFrame.from_dict(kept, orient="index", columns=list(configs))


def paired(one: Group, other: Group) -> Difference | None:
    """Difference of test top-1 in points on the seeds and images that both have; None if they share none."""
    a, b = ({r.seed: r for r in g.records} for g in (one, other))
    seeds = sorted(a.keys() & b.keys())
    pairs = [(a[s].correct, b[s].correct) for s in seeds if a[s].digest == b[s].digest]
    if not pairs or any(x is None or y is None or len(x) != len(y) for x, y in pairs):
        return None
    left, right = (100.0 * np.stack([np.asarray(pair[k], dtype=np.float64) for pair in pairs]) for k in (0, 1))
    return statistics.paired(left, right)


def _columns(column: str, one: Group, other: Group | None, found: Difference | None) -> dict[str, float]:
    parts = ("", " low", " high", " p", " seeds", " t low", " t high")
    row = {f"{column}{part}": math.nan for part in parts}
    if found is None:
        return row if other is None else row | {column: one.mean(ACCURACY) - other.mean(ACCURACY)}
    row |= dict(zip((column, f"{column} low", f"{column} high"), found.interval, strict=True))
    row[f"{column} seeds"] = found.seeds
    if found.student is not None:
        row |= {f"{column} t low": found.student.low, f"{column} t high": found.student.high}
    return row


def _published(one: Group) -> dict[str, object]:
    dataset, teachers, label = one.facts.get("dataset.name", ""), one.teachers, one.label
    found = published.find(dataset, *(([], one.student, ALONE) if one.alone else (teachers, one.student, label)))
    values = (math.nan, "", "", math.nan, math.nan) if found is None else found
    return dict(zip(("published", "published epoch", "source", "band low", "band high"), values, strict=True))


def _cost(one: Group, name: str) -> float:
    """The cost per run; 0 if the runs have cost counters but did no such work."""
    return one.mean(name) if one.values(name) or not one.values("cost/seconds") else 0.0


def _table(groups: Sequence[Group], anyway: bool, baseline: str) -> tuple[pd.DataFrame, list[str]]:
    """A row for each group, and notes on differences that are not the point of a comparison."""
    forwards = sorted({k for g in groups for r in g.records for k in r.metrics if k.startswith("cost/forward_images/")})
    several = len({g.pair for g in groups if not g.alone}) > 1 or len({g.student for g in groups}) > 1
    against = f"vs {baseline}"
    columns = ("vs parent", against, AT_EQUAL_COST)
    rows: list[dict[str, object]] = []
    compared_with: dict[tuple[str, str], Difference] = {}
    notes: dict[str, None] = {}
    for one in groups:
        # a rung's parent is the nearest lower rung that was run with its pair
        below = [rung.name for rung in reversed(rungs.lineage(one.rung.name)[:-1])] if one.rung else []
        parent = pools.reference(groups, one, below, anyway)
        row: dict[str, object] = {"group": one.name, "pair": one.pair} if several else {"group": one.name}
        row |= {
            "parent": parent.name if parent else "",
            "seeds": len(one.records),
            "acc": one.mean(ACCURACY),
            "std": one.std(ACCURACY),
            "last": one.mean(LAST),
            "last_std": one.std(LAST),
            **_published(one),
            "method": one.label,
            "epochs": one.epochs,
            "val_acc": one.mean(VALIDATION),
            "val_contaminated": one.contaminated,
            "synergy": one.mean("final/synergy_acc"),
            "teachers": one.mean("final/teacher_avg_acc"),
        }
        others = (parent, pools.lowest(groups, one, baseline, anyway), pools.at_equal_cost(groups, one, baseline))
        row["epochs at equal cost"] = math.nan if others[-1] is None else others[-1].epochs
        for column, other in zip(columns, others, strict=True):
            found = None if other is None else paired(one, other)
            row |= _columns(column, one, other, found)
            if other is None:
                continue
            row[f"{column} of"] = other.name
            if found is not None:
                compared_with[one.name, other.name] = found
            if column == AT_EQUAL_COST:
                continue  # its epochs are what differs
            unlike = [*pools.unfair(one, other)] if anyway else []
            rest = {k: v for k, v in pools.beside(one, other).items() if k not in (CODE, TEACHERS)}
            if unlike:
                notes[f"unfair: {one.name} and {other.name} have {', '.join(unlike)}"] = None
            if rest:
                notes[f"{one.name} and {other.name} also differ in {pools.named(rest)}"] = None
        row |= {column: _cost(one, name) for column, name in UPDATES.items()}
        row |= {f"images {name.rsplit('/', 1)[1]}": _cost(one, name) for name in forwards}
        row |= {"GMACs": one.mean(GMACS), "seconds": one.mean("cost/seconds")}
        rows.append(row)
    _adjust(rows, columns, compared_with)
    return pd.DataFrame(rows).set_index("group"), list(notes)


def _adjust(
    rows: Sequence[dict[str, object]], columns: Sequence[str], found: Mapping[tuple[str, str], Difference]
) -> None:
    """Holm's p over all comparisons of the table; one that appears in two columns counts once."""
    adjusted = dict(zip(found, statistics.holm([d.p for d in found.values()]), strict=True))
    for row in rows:
        for column in columns:
            key = (str(row["group"]), str(row.pop(f"{column} of", "")))
            row[f"{column} p"] = adjusted.get(key, math.nan)
