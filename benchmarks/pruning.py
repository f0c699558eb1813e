"""What pruning saves, and what it costs: the same study with and without it, three seeds.

    python -m benchmarks.pruning [--seeds 0 1 2] [--trials 30] [--workers 2] [--pruner median]

Real sweeps of `kd_ib_tau` on the bundled sample with shortened trials, each of both kinds with the same sampler seed.
The best configuration of each study is then trained with other seeds: its accuracy there was not selected on.
Writes benchmarks/results/pruning.json.
"""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from pipeline.journal import read_entries
from pipeline.runs.records import from_folder
from pipeline.sweep.study.study import Study

SHORT = (
    *("method.num_stages=2", "method.student_epochs_per_stage=[3,3]", "method.teacher_adapt_epochs=1"),
    *("model.teachers.0.name=cifar_resnet8", "model.teachers.1.name=cifar_resnet14", "optim.use_amp=true"),
)
"""Eight epochs with small teachers, in bf16 where the processor has it: trials of about ten seconds on one core."""
KNOBS = ("sweep.pruner.warmup_epochs=1",)
"""The file's three epochs are nearly half of so short a trial."""
FRESH_SEEDS = (11, 12)


def study(root: Path, seed: int, pruner: str, trials: int, workers: int) -> dict[str, Any]:
    """One sweep: epochs trained, trials by state, the best, and that configuration with fresh seeds."""
    common = (f"output_dir={root}", "tracking=offline", "log_model=false")
    seconds = harness.step(
        "sweep",
        *("cfg=quickstart", *common, *SHORT, f"seed={seed}"),
        *("sweep=kd_ib_tau", f"sweep.sampler.seed={seed}", f"sweep.pruner.name={pruner}"),
        *(KNOBS if pruner == "median" else ()),
        *(f"trials={trials}", f"workers={workers}", f"study={pruner}-{seed}"),
    )
    found = Study.open(f"sqlite:///{root / 'studies.db'}", f"{pruner}-{seed}")
    best, every = found.best(), found.trials()
    assert best is not None
    folders = [Path(t.user_attrs["folder"]) for t in every if "folder" in t.user_attrs]
    taken = [
        (t.duration.total_seconds(), t.user_attrs["seconds"])
        for t in every
        if t.state.name == "COMPLETE" and t.duration is not None and "seconds" in t.user_attrs
    ]
    states = [trial.state.name.lower() for trial in every]
    words = (f"cfg={folders[0].parents[1] / 'best.yaml'}", *common)
    fresh = [harness.distil(root, *words, f"seed={other}") for other in FRESH_SEEDS]
    return {
        "seed": seed,
        "pruner": pruner,
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "epochs": sum(_epochs(folder) for folder in folders),
        "seconds": round(seconds, 1),
        "trial_seconds": round(statistics.median(whole for whole, _ in taken), 2),
        # evaluation of its epochs included
        "outside_training_seconds": round(statistics.median(whole - training for whole, training in taken), 2),
        "best_value": best.value,
        "best_params": best.params,
        "best_with_fresh_seeds": [from_folder(folder).metrics["final/val_acc"] for folder in fresh],
    }


def _epochs(folder: Path) -> int:
    """Number of epochs that a trial recorded."""
    entries = [entry.data for entry in read_entries(folder / "journal.jsonl")[0] if entry.kind == "metrics"]
    return len({data["step"] for data in entries if "train/images_per_second" in data["values"]})


def summary(studies: Sequence[dict[str, Any]], pruner: str) -> dict[str, Any]:
    """Per seed the share of epochs saved, and how the best configurations compare."""
    by = {(s["seed"], s["pruner"]): s for s in studies}
    seeds = sorted({s["seed"] for s in studies})
    saved = [1 - by[seed, pruner]["epochs"] / by[seed, "none"]["epochs"] for seed in seeds]
    fresh = {
        kind: [value for seed in seeds for value in by[seed, kind]["best_with_fresh_seeds"]]
        for kind in (pruner, "none")
    }
    difference = statistics.mean(fresh[pruner]) - statistics.mean(fresh["none"])
    noise = sum(statistics.variance(values) / len(values) for values in fresh.values()) ** 0.5
    return {
        "epochs_saved": [round(share, 3) for share in saved],
        "epochs_saved_mean": round(statistics.mean(saved), 3),
        "fresh_val_acc": {kind: round(statistics.mean(values), 2) for kind, values in fresh.items()},
        "difference": round(difference, 2),
        "standard_error": round(noise, 2),
    }


def main() -> None:
    parser = harness.parser(__doc__, "workers", "output")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--pruner", default="median")
    options = parser.parse_args()
    studies = []
    with tempfile.TemporaryDirectory(prefix="asib-pruning-") as folder:
        for seed in options.seeds:
            for pruner in (options.pruner, "none"):
                studies.append(study(Path(folder), seed, pruner, options.trials, options.workers))
                print(json.dumps(studies[-1]), flush=True)
    result = harness.described()
    result |= {"overrides": SHORT, "summary": summary(studies, options.pruner), "studies": studies}
    print(json.dumps(result["summary"], indent=2))
    harness.write("pruning", result, options.output)


if __name__ == "__main__":
    main()
