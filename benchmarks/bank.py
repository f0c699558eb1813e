"""What the teacher bank saves a sweep: the same 20 trials over shared teachers with and without it, turn about.

    python -m benchmarks.bank [--rounds 1] [--trials 20] [--images 640] [--workers 1] [--amp] [--epochs 2]

Real sweeps (`steps.sweep`, off line, no pruning) of temperature and weight of distillation: resnet32x4 and wrn_40_2,
fine-tuned once before, teach resnet20 on synthetic images. Each round begins with an empty bank, whose making is part
of its time. About 20 minutes on two cores, with nothing else on them. Writes benchmarks/results/bank.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna

from benchmarks.images import write_images
from benchmarks.machine import described
from pipeline.runs.records import from_folder

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bank.json"
TARGET = 0.4
"""Issue 6: at most this share of the sweep without a bank, where teachers cost at least `COST` times the student."""
COST = 4.0
RUN = (
    *("cfg=quickstart", "dataset=npz", "dataset.val_fraction=0.1", "log_model=false", "tracking=offline"),
    *("finetune.epochs=1", "model/teacher=resnet32x4_wrn_40_2", "model/student=cifar_resnet20"),
    *("method.num_stages=1", "method.teacher_adapt_epochs=1", "method.kd_warmup_epochs=0"),
)
SWEEP = """
space:
  method.kd_alpha: {type: float, low: 0.1, high: 0.9}
  method.tau: {type: float, low: 1, high: 8}
sampler: {name: random, seed: 0}
pruner: {name: none}
objectives:
  - {metric: final/val_acc, direction: maximize}
"""


def run(step: str, *arguments: str) -> float:
    """Run a step; its seconds, imports included."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", f"steps.{step}", *arguments]
    subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def study(root: Path, name: str, common: list[str], options: argparse.Namespace, bank: str) -> dict[str, Any]:
    """One sweep: seconds of all of it and of each trial, images/s of its steps, size of its bank."""
    folder = root / f"bank-{name}"
    seconds = run(
        "sweep",
        *(*common, f"sweep={root / 'sweep.yaml'}", f"trials={options.trials}", f"workers={options.workers}"),
        *(f"study={name}", f"bank={bank}", f"bank_folder={folder}"),
    )
    found = optuna.load_study(study_name=name, storage=f"sqlite:///{root / 'runs' / 'studies.db'}")
    trials = found.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    if len(trials) != options.trials:
        raise SystemExit(f"{len(trials)} of {options.trials} trials completed: see {root}")
    runs = [from_folder(Path(trial.user_attrs["folder"])) for trial in trials]
    macs = {k.rsplit("/", 1)[1]: v for k, v in runs[0].metrics.items() if k.startswith("cost/macs_per_image/")}
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        "bank": bank,
        "seconds": round(seconds, 1),
        "trial_seconds": [round(t.duration.total_seconds(), 2) for t in trials if t.duration is not None],
        "training_seconds": [round(r.metrics["cost/seconds"], 2) for r in runs],
        "macs_per_image": macs,
        "val_acc": [round(r.metrics["final/val_acc"], 2) for r in runs],
        "bank_megabytes": round(sum(file.stat().st_blocks * 512 for file in files) / 1e6, 1),
    }


def cost_ratio(found: dict[str, Any]) -> float:
    """Multiply-accumulates of the teachers' forward passes to those of the student's training pass (three forward)."""
    macs = found["macs_per_image"]
    return float(sum(v for k, v in macs.items() if k.startswith("teacher_")) / (3 * macs["student"]))


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both kinds, alternating which is first."""
    (root / "sweep.yaml").write_text(SWEEP)
    data = write_images(root / "data.npz", options.images)
    epochs = f"method.student_epochs_per_stage=[{options.epochs}]"
    common = [*RUN, epochs, f"dataset.path={data}", f"output_dir={root / 'runs'}"]
    common += ["optim.use_amp=true"] if options.amp else []
    run("finetune", *common)
    rounds = []
    for number in range(options.rounds):
        order = ["off", "auto"] if number % 2 == 0 else ["auto", "off"]
        both = {bank: study(root, f"{bank}-{number}", common, options, bank) for bank in order}
        ratio = both["auto"]["seconds"] / both["off"]["seconds"]
        rounds.append({"first": order[0], "ratio": round(ratio, 3), **both})
        print(json.dumps({"round": number, "ratio": round(ratio, 3)}), flush=True)
    return {
        "trials": options.trials,
        "workers": options.workers,
        "images": options.images,
        "epochs": 1 + options.epochs,
        "precision": "bfloat16" if options.amp else "float32",
        "teachers_to_student_cost": round(cost_ratio(rounds[0]["off"]), 2),
        "required_cost": COST,
        "target_ratio": TARGET,
        "median_ratio": round(statistics.median(r["ratio"] for r in rounds), 3),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--images", type=int, default=640, help="a tenth is held out")
    parser.add_argument("--epochs", type=int, default=2, help="B-epochs of a trial, beside one A-epoch")
    parser.add_argument("--workers", type=int, default=1, help="with several the bank is built ahead")
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = described("timm")
    with tempfile.TemporaryDirectory(prefix="asib-bank-") as folder:
        result |= measure(Path(folder), options)
    result["load_after"] = round(os.getloadavg()[0], 2)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: result[k] for k in ("teachers_to_student_cost", "median_ratio", "target_ratio")}, indent=2))


if __name__ == "__main__":
    main()
