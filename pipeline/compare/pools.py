"""Which runs are seeds of one configuration, and which configurations may be compared (docs/method.md section 9)."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.compose import rungs
from pipeline.config.identity import NOT_COMPUTATION, canonical, listed
from pipeline.errors import UserError
from pipeline.runs.naming import told
from pipeline.runs.records import Record

VALIDATION = "final/val_acc"
GMACS = "cost/gmacs"
ROUNDING = ("optim.use_amp", "optim.compile", "bank")
"""Keys outside the configuration's hash that can still change a result."""
NOT_COMPARED = ("seed", *(key for key in NOT_COMPUTATION if key not in ROUNDING))
TEACHERS, CODE, DATA = "teachers", "code", "data"
"""Parts of a run's identity that are not keys of its configuration."""
OF_TEACHERS = ("teachers", "model.teachers", "finetune.")
OF_METHODS = {"method.", "bank"}
"""What a method sets, and what follows from it: some can use no bank."""
NONE = "none"
EPOCHS = "method.student_epochs_per_stage"
SPLIT = ("dataset.val_fraction", "dataset.split_seed")
TASKS = tuple(f"continual.{key}" for key in ("num_tasks", "scenario", "base_classes", "order", "order_seed"))
OTHER_EPOCHS = "other epochs"
SHOWN = 4
"""How many differences a line names."""


def facts(run: Record) -> dict[str, str]:
    """All that decides a run's result, except the seed; teachers are identified by their weights, not their paths."""
    teachers = run.tags.get("asib.teachers")
    known = {k: v for k, v in run.config.items() if not listed(k, NOT_COMPARED)}
    if teachers is not None:
        known = {k: v for k, v in known.items() if not k.endswith(".checkpoint")}
    git = f"{run.tags.get('asib.git_sha', '')[:12]}{'+' if run.tags.get('asib.git_dirty') == 'true' else ''}"
    code = run.tags.get("asib.sources", "")[:12] or git
    return known | _used(run) | {TEACHERS: teachers or "", CODE: code, DATA: run.digest}


def _used(run: Record) -> dict[str, str]:
    """What `auto` and its like came to, as a result's identity has it: `bank: auto` and `lazy` may be the same."""
    bank = run.tags.get("asib.bank")
    found = {} if bank is None else {"bank": "off" if bank == "off" else "on"}
    compiled = {"optim.compile": str("cost/compile_seconds" in run.metrics).lower()}
    return found | (compiled if "optim.compile" in run.config else {})


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, one for each seed, in the seeds' order."""

    name: str
    records: tuple[Record, ...]

    @property
    def rung(self) -> rungs.Rung | None:
        return rungs.known().get(self.records[0].rung or "")

    @property
    def label(self) -> str:
        """The rung or method, which groups of several pairs share; their name where they have none."""
        return self.records[0].label or self.name

    def called(self, name: str) -> bool:
        """Whether a comparison's `baseline=<name>` means it: by its label, or by its own name."""
        return name in (self.label, self.name)

    @property
    def alone(self) -> bool:
        """Whether no teacher was used."""
        return self.facts[TEACHERS] == NONE

    @property
    def student(self) -> str:
        return self.facts.get("model.student.name", "")

    @property
    def epochs(self) -> int:
        """The student's epochs; 0: unknown."""
        return sum(map(int, re.findall(r"\d+", self.facts.get(EPOCHS, ""))))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(r.seed for r in self.records)

    @cached_property
    def facts(self) -> dict[str, str]:
        return facts(self.records[0])

    @property
    def teachers(self) -> list[str]:
        """The teachers' names, of a student alone too if its configuration has some."""
        return [v for k, v in sorted(self.facts.items()) if re.fullmatch(r"model\.teachers\.\d+\.name", k)]

    @property
    def pair(self) -> str:
        """Teachers and student, as users read them."""
        names = self.teachers
        hashes = [h[:6] for h in self.facts[TEACHERS].split(",") if h and h != NONE]
        teachers = f"{' + '.join(names)} ({', '.join(hashes)})" if hashes else " + ".join(names)
        return " → ".join(filter(None, [teachers, self.student]))

    @property
    def contaminated(self) -> bool:
        return any(r.tags.get("asib.val_contaminated") == "true" for r in self.records)

    def values(self, metric: str) -> list[float]:
        """The metric's values, from the runs that have it."""
        return [r.metrics[metric] for r in self.records if metric in r.metrics]

    def mean(self, metric: str) -> float:
        values = self.values(metric)
        return float(np.mean(values)) if values else math.nan

    def std(self, metric: str) -> float:
        """Standard deviation over seeds, with n - 1; NaN for one seed."""
        values = self.values(metric)
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    @property
    def validation(self) -> float | None:
        values = self.values(VALIDATION)
        return float(np.mean(values)) if len(values) == len(self.records) else None


def group(runs: Sequence[Record]) -> list[Group]:
    """Group runs by rung or row and by everything except the seed: rungs in the ladder's order, then the others.

    Of equal runs with the same seed the last one is taken.
    """
    found: dict[tuple[str, str], dict[int, Record]] = {}
    for run in runs:
        key = hashlib.sha256(canonical(facts(run)).encode()).hexdigest()
        found.setdefault((run.rung or run.tags.get("asib.row", ""), key), {})[run.seed] = run
    order = list(rungs.known())
    keys = sorted(found, key=lambda k: order.index(k[0]) if k[0] in order else len(order))
    counts: dict[str, int] = {}
    groups = []
    for row, key in keys:
        records = tuple(record for _, record in sorted(found[row, key].items()))
        name = row or _told_apart(
            records[0], [next(iter(runs.values())) for (other, _), runs in found.items() if not other]
        )
        counts[name] = counts.get(name, 0) + 1
        groups.append(Group(name if counts[name] == 1 else f"{name} ({counts[name]})", records))
    return groups


def _told_apart(run: Record, others: Sequence[Record]) -> str:
    """The method, and the keys in which the others of that method differ: `asib kd_alpha=0.8`."""
    method = run.label or run.tags.get("asib.step", "run")
    alike = [facts(other) for other in others if other.label == run.label]
    own = {k: v for k, v in facts(run).items() if k not in (TEACHERS, CODE, DATA)}
    differing = [k for k, v in own.items() if any(other.get(k, "") != v for other in alike)]
    words = told({k: own[k] for k in differing})
    return " ".join([method, *words[:SHOWN], *(["…"] if len(words) > SHOWN else [])])


# what differs --------------------------------------------------------------------------------------------------------

Differences = dict[str, tuple[str, str]]


def differences(one: Group, other: Group) -> Differences:
    """Facts in which two groups differ; those about teachers are left out if one group has none."""
    a, b = one.facts, other.facts
    alone = NONE in (a[TEACHERS], b[TEACHERS])
    return {
        k: (a.get(k, ""), b.get(k, ""))
        for k in [*a, *(k for k in b if k not in a)]
        if a.get(k, "") != b.get(k, "") and not (alone and k.startswith(OF_TEACHERS))
    }


def about(one: Group, other: Group) -> set[str] | None:
    """The keys (and sections, with a dot) that a comparison of two rungs, or of two methods, is about; None: any."""
    if one.rung is None or other.rung is None:
        return None if one.label == other.label or "" in (one.records[0].label, other.records[0].label) else OF_METHODS
    above = [rung.name for rung in rungs.lineage(one.rung.name)]
    if other.rung.name not in above:
        return set()
    between = above[above.index(other.rung.name) + 1 :]
    # with renorm_ce_kd cross-entropy's weight follows from that of distillation
    renormed = {"method.ce_alpha"} if one.facts.get("method.renorm_ce_kd") == "true" else set()
    return {key for name in between for key in rungs.known()[name].sets} | renormed | {"bank"}


def beside(one: Group, other: Group) -> Differences:
    """Differences between two groups other than the one that their comparison is about."""
    keys, found = about(one, other), differences(one, other)
    return {k: v for k, v in found.items() if (k == CODE if keys is None else not listed(k, keys))}


def unfair(one: Group, other: Group) -> list[str]:
    """Differences, in words, that make a comparison of methods unfair: teachers, student, epochs, data, split."""
    found = differences(one, other)
    said = []
    if TEACHERS in found or any(re.fullmatch(r"model\.teachers\.\d+\.name", k) for k in found):
        said.append("other teachers ({} and {})".format(*(g.pair.rpartition(" → ")[0] for g in (one, other))))
    if any(k.startswith("model.student.") for k in found):
        said.append(
            "other students ({} and {})".format(*(g.facts.get("model.student.name", "?") for g in (one, other)))
        )
    if one.epochs != other.epochs:
        said.append(f"{OTHER_EPOCHS} ({one.epochs} and {other.epochs})")
    if DATA in found:
        said.append("other data ({} and {})".format(*(v[:12] for v in found[DATA])))
    said += [f"another split ({k}: {' and '.join(found[k])})" for k in SPLIT if k in found]
    said += [f"other tasks ({k}: {' and '.join(found[k])})" for k in TASKS if k in found]
    return said


def named(found: Differences) -> str:
    """`method.tau (4.0, 2.0), code (ab…, cd…)`; the first few."""
    parts = [f"{k} ({a[:12] or 'none'}, {b[:12] or 'none'})" for k, (a, b) in found.items()]
    return ", ".join(parts[:SHOWN]) + (f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else "")


# which is compared with which ----------------------------------------------------------------------------------------


def reference(groups: Sequence[Group], one: Group, labels: Sequence[str], anyway: bool) -> Group | None:
    """The group of the first of these rungs or methods that may be compared with `one`, the one that is most like it.

    Raises UserError: there are candidates, but each comparison would be unfair; `anyway` takes the first of them.
    """
    refused: list[Group] = []
    for label in labels:
        candidates = [g for g in groups if g is not one and g.called(label)]
        fair = [g for g in candidates if not unfair(one, g)]
        if one.alone and len({g.facts[TEACHERS] for g in fair} - {NONE}) > 1:
            return None  # a student alone beside several pairs: each of them is compared with it instead
        if fair:
            return _most_alike(one, fair)
        refused += candidates
    return _refused(one, refused, anyway)


def _most_alike(one: Group, others: Sequence[Group]) -> Group:
    # students alone of two pairs may be identical: the own pair's is taken
    return min(others, key=lambda g: (len(beside(one, g)), sum(one.facts.get(k) != v for k, v in g.facts.items())))


def lowest(groups: Sequence[Group], one: Group, baseline: str, anyway: bool) -> Group | None:
    """What every group is compared with: the baseline rung or method of its pair; the baseline itself with nothing."""
    return None if one.called(baseline) else reference(groups, one, [baseline], anyway)


ALIKE = 0.05
"""By which share two total costs may differ and still be equal: epochs are whole numbers."""


def at_equal_cost(groups: Sequence[Group], one: Group, baseline: str) -> Group | None:
    """The baseline of the same pair that was trained until it cost as much as `one`; None if no run did.

    Only the number of its epochs may make the comparison unfair.
    """
    cost = one.mean(GMACS)
    if one.called(baseline) or not cost > 0:
        return None
    found = [
        g
        for g in groups
        if g.called(baseline)
        and abs(g.mean(GMACS) / cost - 1) <= ALIKE
        and all(reason.startswith(OTHER_EPOCHS) for reason in unfair(one, g))
    ]
    return min(found, key=lambda g: abs(g.mean(GMACS) - cost), default=None)


def _refused(one: Group, others: Sequence[Group], anyway: bool) -> Group | None:
    if not others or anyway:
        return others[0] if others else None
    raise UserError(
        f"{one.name} is not compared with {others[0].name}: {', '.join(unfair(one, others[0]))}; leave one of them "
        "out, add the runs that belong to it, or give anyway=true"
    )


def names_of(groups: Sequence[Group]) -> dict[str, str]:
    """Each group's name -> what it is called within its pair: its label, with its epochs where another has the same."""
    labels, timed = [g.label for g in groups], [f"{g.label}, {g.epochs} epochs" for g in groups]
    usual = {g.label: g.epochs for g in reversed(groups)}  # the first one of a label is the one that others share
    return {
        g.name: g.label
        if labels.count(g.label) == 1 or (g.epochs == usual[g.label] and timed.count(timed[k]) == 1)
        else timed[k]
        if timed.count(timed[k]) == 1
        else g.name
        for k, g in enumerate(groups)
    }
