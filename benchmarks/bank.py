"""What the teacher bank saves a sweep: the same 20 trials over shared teachers with and without it, alternating.

    python -m benchmarks.bank [--rounds 1] [--trials 20] [--images 640] [--workers 1] [--amp] [--epochs 2]

Real sweeps (`steps.sweep`, offline, no pruning) of temperature and weight of distillation: resnet32x4 and wrn_40_2,
fine-tuned once before, teach resnet20 on synthetic images. Each round begins with an empty bank, and filling it is part
of its time. About 20 minutes on two cores, with nothing else running. Writes benchmarks/results/bank.json.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.steps.clock import interleaved, ratios
from pipeline.runs.records import from_folder
from pipeline.sweep.study.study import Study

TARGET = 0.4
"""At most this share of the sweep without a bank, where teachers cost at least `COST` times the student."""
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


def study(root: Path, common: list[str], options: argparse.Namespace, bank: str) -> dict[str, Any]:
    """One sweep: seconds in total and per trial, size of its bank, cost of its trials."""
    folder = Path(tempfile.mkdtemp(prefix=f"{bank}-", dir=root))
    seconds = harness.step(
        "sweep",
        *(*common, f"sweep={root / 'sweep.yaml'}", f"trials={options.trials}", f"workers={options.workers}"),
        *(f"study={folder.name}", f"bank={bank}", f"bank_folder={folder}"),
    )
    found = Study.open(f"sqlite:///{root / 'runs' / 'studies.db'}", folder.name).trials()
    trials = [trial for trial in found if trial.state.name == "COMPLETE"]
    if len(trials) != options.trials:
        raise SystemExit(f"{len(trials)} of {options.trials} trials completed: see {root}")
    runs = [from_folder(Path(trial.user_attrs["folder"])) for trial in trials]
    return {
        "bank": bank,
        "seconds": round(seconds, 1),
        "trial_seconds": [round(t.duration.total_seconds(), 2) for t in trials if t.duration is not None],
        "training_seconds": [round(r.metrics["cost/seconds"], 2) for r in runs],
        "macs_per_image": {
            k.rsplit("/", 1)[1]: v for k, v in runs[0].metrics.items() if k.startswith("cost/macs_per_image/")
        },
        "val_acc": [round(r.metrics["final/val_acc"], 2) for r in runs],
        "bank_megabytes": round(sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file()) / 1e6, 1),
    }


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both kinds; which one goes first alternates."""
    (root / "sweep.yaml").write_text(SWEEP)
    data = harness.write_images(root / "data.npz", options.images)
    epochs = f"method.student_epochs_per_stage=[{options.epochs}]"
    common = [*RUN, epochs, f"dataset.path={data}", f"output_dir={root / 'runs'}"]
    common += ["optim.use_amp=true"] if options.amp else []
    harness.step("finetune", *common)
    sweeps = {bank: partial(study, root, common, options, bank) for bank in ("off", "auto")}
    rounds = interleaved(sweeps, options.rounds)
    macs = rounds["off"][0]["macs_per_image"]
    teachers = sum(v for k, v in macs.items() if k.startswith("teacher_"))
    return {
        "trials": options.trials,
        "workers": options.workers,
        "images": options.images,
        "epochs": 1 + options.epochs,
        "precision": "bfloat16" if options.amp else "float32",
        # multiply-accumulates of their forward passes to those of its training pass (three forward)
        "teachers_to_student_cost": round(teachers / (3 * macs["student"]), 2),
        "required_cost": COST,
        "target_ratio": TARGET,
        "ratios": ratios(*([one["seconds"] for one in rounds[bank]] for bank in ("auto", "off"))),
        "rounds": rounds,
    }


def main() -> None:
    parser = harness.parser(__doc__, "output")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--images", type=int, default=640, help="a tenth is held out")
    parser.add_argument("--epochs", type=int, default=2, help="B-epochs of a trial, beside one A-epoch")
    parser.add_argument("--workers", type=int, default=1, help="with several the bank is built ahead")
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    options = parser.parse_args()
    result = harness.described("timm")
    with tempfile.TemporaryDirectory(prefix="asib-bank-") as folder:
        result |= measure(Path(folder), options)
    print(json.dumps({k: result[k] for k in ("teachers_to_student_cost", "ratios", "target_ratio")}, indent=2))
    harness.write("bank", result, options.output)


if __name__ == "__main__":
    main()
