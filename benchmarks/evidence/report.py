"""What docs/results.md shows of the records: tables in Markdown, and pictures."""

import json
from collections.abc import Sequence
from statistics import mean, median, mode

from pipeline.compare import pictures as drawn
from pipeline.compare import report as comparisons
from pipeline.compare.compare import ACCURACY, Comparison, compare
from pipeline.compare.pools import Group, names_of
from pipeline.reporting import tables
from pipeline.runs.records import ALONE, Record

READINGS = {
    "final/synergy_acc": "synergy, test",
    "final/teacher_avg_acc": "averaged teachers, test",
    "synergy/acc": "synergy, validation †",
    "b_step/target_entropy": "entropy of the target, nats",
    "a_step/sigma": "mean σ",
    "a_step/raw_kl": "KL per dimension",
    "a_step/cw_mean": "certainty weight",
    "a_step/cw_at_bounds": "share at its bounds",
    "gate/open": "gate",
    "gate/averaged_share": "c",
    "b_step/sample_gate": "share distilled",
}
"""What a fusion's run says about itself (docs/tracking.md), and what the page calls it."""

NOT_YET = "Not measured yet."
SUGGESTED = ("_free", "_sharp", "_tuned")
"""How the rows end that came after the planned ones had been read."""
LONGER = 21
"""Epochs of the rows that were trained again for longer."""
STUDY, TRIAL = "asib.study", "asib.trial"
"""Tags of a sweep and its trials."""


def against(baseline: str, runs: Sequence[Record]) -> Comparison:
    """All rows against one of them (the first while that one is not there), although some have one teacher or none."""
    there = any(run.label == baseline for run in runs)
    return compare(runs, anyway=True, baseline=baseline if there else None)


def first(runs: Sequence[Record]) -> list[Record]:
    """The planned rows: none that the readings or a sweep suggested, and as many student epochs as most."""
    return [run for run in short_ones(runs) if not run.label.endswith(SUGGESTED)]


def short_ones(runs: Sequence[Record]) -> list[Record]:
    """The rows with as many student epochs as most."""
    usual = mode(map(epochs, runs))
    return [run for run in runs if epochs(run) == usual]


def split_longer(runs: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """All other rows, and those that were trained again for longer."""
    return [run for run in runs if epochs(run) != LONGER], [run for run in runs if epochs(run) == LONGER]


def epochs(run: Record) -> int:
    """The student's epochs."""
    return Group(run.label, (run,)).epochs


def accuracy(found: Comparison) -> str:
    """Accuracy of every row, and its difference to distillation from the better teacher alone."""
    return _columns(found, "seeds", "acc", "last", "val acc", "vs kd")


def short(found: Comparison) -> str:
    """What README shows: accuracies, and the mean difference to the student alone on the seeds that both have."""
    alone = {run.seed: run for group in found.groups if group.name == ALONE for run in group.records}
    rows, names = [], names_of(found.groups)
    for group in sorted(found.groups, key=_accuracy, reverse=True):
        both = [
            (run.metrics[ACCURACY], alone[run.seed].metrics[ACCURACY]) for run in group.records if run.seed in alone
        ]
        gain = f"{mean(one - other for one, other in both):+.1f}" if both and group.name != ALONE else ""
        accuracy = comparisons.with_deviation(group.mean(ACCURACY), group.std(ACCURACY))
        rows.append([names[group.name], str(_teachers(group.records[0])), str(len(group.records)), accuracy, gain])
    return tables.markdown(["row", "teachers", "seeds", "test top-1 in %", "vs alone"], rows)


def _teachers(run: Record) -> int:
    hashes = run.tags["asib.teachers"]
    return 0 if hashes == "none" else len(hashes.split(","))


def several(runs: Sequence[Record]) -> str:
    """Planned rows of two teachers against equal weights for them."""
    return _family("aver", [run for run in first(runs) if _teachers(run) > 1])


def suggested(runs: Sequence[Record]) -> str:
    """What the readings suggested, against the row whose readings they were."""
    return _family("asib_l1d", [run for run in runs if run.label.startswith("asib_l1d") or run.label == "aver"])


def free(runs: Sequence[Record]) -> str:
    """What the readings suggested, against the best planned row."""
    return _family("aver", [run for run in runs if run.label in ("aver", "asib_l1d_free")])


def tuned(runs: Sequence[Record]) -> str:
    """Both methods with the values that their sweeps chose, and as they were before, against the tuned baseline."""
    return _family(
        "aver_tuned", [run for run in runs if run.label in ("aver", "aver_tuned", "asib_l1d_free", "asib_tuned")]
    )


def longer(runs: Sequence[Record]) -> str:
    """The rows that were trained again for longer, and the same seeds of them as they were before."""
    usual, again = short_ones(runs), split_longer(runs)[1]
    both = {(run.label, run.seed) for run in usual} & {(run.label, run.seed) for run in again}
    if "aver" not in {label for label, _ in both}:
        return NOT_YET
    before, more = ([run for run in some if (run.label, run.seed) in both] for some in (usual, again))
    rows: dict[str, list[str]] = {}
    head = ["row", "seeds"]
    for some in (more, before):
        found = against("aver", some)
        shown = comparisons.shown(found)
        head += [f"acc, {epochs(some[0])} epochs", "vs aver"]
        for group in sorted(found.groups, key=_accuracy, reverse=True):
            row = rows.setdefault(group.label, [group.label, str(len(group.records))])
            row += map(str, shown.loc[group.name, ["acc", "vs aver"]])
    return tables.markdown(head, [*rows.values()])


def equal_cost(runs: Sequence[Record]) -> str:
    """The student alone, also trained until it costs as much as the best planned row, against that row."""
    return _family("aver", [run for run in runs if run.label in ("aver", ALONE)], "GMACs")


def _family(baseline: str, runs: Sequence[Record], *columns: str) -> str:
    """Rows that are compared with one of them, a family of its own for Holm's adjustment."""
    if baseline not in {run.label for run in runs}:
        return NOT_YET
    return _columns(against(baseline, runs), "seeds", "acc", *columns, f"vs {baseline}")


def cost(found: Comparison) -> str:
    """What a run of every row costs."""
    passes = [f"images {net}" for net in ("student", "teacher_0", "teacher_1", "fusion")]
    return _columns(found, "student updates", "fusion updates", *passes, "GMACs")


def _columns(found: Comparison, *names: str) -> str:
    """Rows by accuracy, the best first, with some of a comparison's columns."""
    shown = comparisons.shown(found)
    head = [name for name in names if name in shown]
    called, by_accuracy = names_of(found.groups), sorted(found.groups, key=_accuracy, reverse=True)
    return tables.markdown(["row", *head], [[called[g.name], *map(str, shown.loc[g.name, head])] for g in by_accuracy])


def _accuracy(group: Group) -> float:
    return group.mean(ACCURACY)


def readings(found: Comparison) -> str:
    """Means over seeds of what the fusions' runs say in their last epoch that says it."""
    groups = sorted((g for g in found.groups if g.values("synergy/acc")), key=_accuracy, reverse=True)
    if not groups:
        return NOT_YET
    rows = [[name, *(_mean(group, metric) for group in groups)] for metric, name in READINGS.items()]
    return tables.markdown(["last epoch, mean over seeds", *(g.name for g in groups)], rows)


def _mean(group: Group, metric: str) -> str:
    return f"{group.mean(metric):.3g}" if group.values(metric) else "–"


def sweeps(runs: Sequence[Record]) -> str:
    """What each sweep tried, and what it chose by validation images; test images have no part in it."""
    rows = []
    for study in (run for run in runs if TRIAL not in run.tags):
        trials = [run for run in runs if run is not study and run.tags[STUDY] == study.tags[STUDY]]
        ended = [run.metrics["final/val_acc"] for run in trials if run.status == "FINISHED"]
        chosen = json.loads(study.tags["asib.best_params"])
        values = ", ".join(f"`{key.removeprefix('method.')}` {value:.3g}" for key, value in chosen.items())
        pruned = len(trials) - len(ended)
        kept = trials[0].config.get("method.tau_syn", "null")
        method = trials[0].label + ("" if kept == "null" else f", tau_syn={float(kept):g}")
        rows.append([method, str(len(trials)), str(pruned), f"{median(ended):.2f}", f"{max(ended):.2f}", values])
    head = ["method", "trials", "of them pruned", "median of the finished", "best val acc", "best values"]
    return tables.markdown(head, rows) if rows else NOT_YET


def commands(found: Comparison) -> str:
    """How each row is repeated, with the seeds and the commit of its records."""
    usual = next((group.epochs for group in found.groups), 0)
    rows, names = [], names_of(found.groups)
    for group in found.groups:
        first = group.records[0]
        commits = dict.fromkeys(run.tags["asib.git_sha"][:10] for run in group.records)
        table = "evidence" if _teachers(first) > 1 else "evidence_single"
        chosen = f"methods={group.label} table.baseline={group.label} seeds={group.seeds[0]}"
        stages = first.config["method.student_epochs_per_stage"].replace(" ", "")
        count = f" method.num_stages={stages.count(',') + 1}" if "," in stages else ""
        changed = "" if group.epochs == usual else f'{count} "method.student_epochs_per_stage={stages}"'
        own = f"python -m steps.table table={table} {chosen}{changed} threads=1 dataset.root=<folder>"
        repeated = own if "asib.row" in first.tags else first.tags["asib.command"]
        rows.append([names[group.name], ", ".join(map(str, group.seeds)), ", ".join(commits), f"`{repeated}`"])
    return tables.markdown(["row", "seeds", "commit", "command"], rows, left=4)


def parts(runs: Sequence[Record], searched: Sequence[Record]) -> dict[str, str]:
    """Every part of the pages, by its name, of the rows' runs and of those that belong to sweeps."""
    everything, (runs, _) = runs, split_longer(runs)
    one, every = against("kd", first(runs)), against(ALONE, runs)
    return {
        "short": short(every),
        "accuracy": accuracy(one),
        "several": several(runs),
        "cost": cost(one),
        "longer": longer(everything),
        "equal cost": equal_cost(runs),
        "readings": readings(every),
        "suggested": suggested(runs),
        "free": free(runs),
        "sweeps": sweeps(searched),
        "tuned": tuned(runs),
        "commands": commands(against(ALONE, everything)),
    }


def pictures(runs: Sequence[Record]) -> dict[str, bytes]:
    """The pictures that the pages show, by their names."""
    return {
        "results.png": drawn.accuracies(against("kd", short_ones(runs))),
        "results_cost.png": drawn.cost(against(ALONE, split_longer(runs)[0])),
    }
