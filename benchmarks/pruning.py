"""What pruning saves, and what it costs: the same study with and without it, three seeds.

    python -m benchmarks.pruning [--seeds 0 1 2] [--trials 30] [--workers 2] [--pruner median]

Real sweeps of `kd_ib_tau` on the bundled sample with shortened trials, each of both kinds with the same sampler seed.
The best configuration of each study is then trained with other seeds: its accuracy there was not selected on.
Writes benchmarks/results/pruning.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna

from benchmarks.machine import described
from pipeline.runs.records import from_folder

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "pruning.json"
SHORT = (
    *("method.num_stages=2", "method.student_epochs_per_stage=[3,3]", "method.teacher_adapt_epochs=1"),
    *("model.teachers.0.name=cifar_resnet8", "model.teachers.1.name=cifar_resnet14", "optim.use_amp=true"),
)
"""Eight epochs with small teachers, in bf16 where the processor has it: trials of about ten seconds on one core."""
KNOBS = ("sweep.pruner.warmup_epochs=1",)
"""The file's three epochs are nearly half of so short a trial."""
FRESH_SEEDS = (11, 12)


def run(step: str, *arguments: str) -> float:
    """Run a step; its seconds."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", f"steps.{step}", "tracking=offline", *arguments]
    subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def study(root: Path, seed: int, pruner: str, trials: int, workers: int) -> dict[str, Any]:
    """One sweep: epochs trained, trials by state, the best, and that configuration with fresh seeds."""
    name = f"{pruner}-{seed}"
    seconds = run(
        "sweep",
        *("cfg=quickstart", f"output_dir={root}", *SHORT, "log_model=false", f"seed={seed}"),
        *("sweep=kd_ib_tau", f"sweep.sampler.seed={seed}", f"sweep.pruner.name={pruner}"),
        *(KNOBS if pruner == "median" else ()),
        *(f"trials={trials}", f"workers={workers}", f"study={name}"),
    )
    found = optuna.load_study(study_name=name, storage=f"sqlite:///{root / 'studies.db'}")
    folders = [Path(t.user_attrs["folder"]) for t in found.trials if "folder" in t.user_attrs]
    states = [trial.state.name for trial in found.trials]
    parent = folders[0].parents[1]
    fresh = []
    for other in FRESH_SEEDS:
        before = set(root.glob("*-distill-*"))
        run("distill", f"cfg={parent / 'best.yaml'}", f"output_dir={root}", "log_model=false", f"seed={other}")
        (folder,) = set(root.glob("*-distill-*")) - before
        fresh.append(from_folder(folder).metrics["final/val_acc"])
    return {
        "seed": seed,
        "pruner": pruner,
        "trials": {state.lower(): states.count(state) for state in sorted(set(states))},
        "epochs": sum(_epochs(folder) for folder in folders),
        "seconds": round(seconds, 1),
        "trial_seconds": _trial_seconds(found),
        "outside_training_seconds": _outside(found),
        "best_value": found.best_value,
        "best_params": found.best_params,
        "best_with_fresh_seeds": fresh,
    }


def _complete(found: optuna.Study) -> list[tuple[float, float | None]]:
    """(seconds, of which training) of every complete trial."""
    complete = found.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    return [(t.duration.total_seconds(), t.user_attrs.get("seconds")) for t in complete if t.duration is not None]


def _trial_seconds(found: optuna.Study) -> float:
    """A complete trial's duration: the median, in seconds."""
    return round(statistics.median(whole for whole, _ in _complete(found)), 2)


def _outside(found: optuna.Study) -> float:
    """What a complete trial costs besides its training, evaluation of its epochs included: the median, in seconds."""
    found_both = ((whole, training) for whole, training in _complete(found) if training is not None)
    return round(statistics.median(whole - training for whole, training in found_both), 2)


def _epochs(folder: Path) -> int:
    """Epochs whose record a trial has left."""
    lines = (folder / "journal.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return len({e["step"] for e in entries if e["kind"] == "metrics" and "train/images_per_second" in e["values"]})


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pruner", default="median")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    studies = []
    with tempfile.TemporaryDirectory(prefix="asib-pruning-") as folder:
        for seed in options.seeds:
            for pruner in (options.pruner, "none"):
                studies.append(study(Path(folder), seed, pruner, options.trials, options.workers))
                print(json.dumps(studies[-1]), flush=True)
    found = {**described(), "overrides": SHORT, "summary": summary(studies, options.pruner), "studies": studies}
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found["summary"], indent=2))


if __name__ == "__main__":
    main()
