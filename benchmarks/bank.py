"""What the teacher bank saves a sweep: the same 20 trials over shared teachers with and without it, alternating.

    python -m benchmarks.bank [--method asib] [--rounds 1] [--trials 20] [--images 640] [--epochs 2] [--amp]

Real sweeps (`steps.sweep`, offline, no pruning) of temperature and weight of distillation, on synthetic images, with
teachers that were fine-tuned once before. Each round begins with an empty bank, and filling it is part of its time.
About 20 minutes on two cores for ASIB, with nothing else running. Writes benchmarks/results/bank_<method>.json.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import harness
from benchmarks.steps.clock import interleaved, ratios
from pipeline.runs.records import from_folder
from pipeline.sweep.study.study import Study

COST = 4.0
"""What teachers cost at the least, times the student, where a target holds."""
RUN = (
    *("cfg=quickstart", "dataset=npz", "dataset.val_fraction=0.1", "log_model=false", "tracking=offline"),
    *("finetune.epochs=1", "method.num_stages=1", "method.kd_warmup_epochs=0"),
)
METHODS: dict[str, tuple[float, tuple[str, ...]]] = {
    "asib": (
        0.4,
        ("model/teacher=resnet32x4_wrn_40_2", "model/student=cifar_resnet20", "method.teacher_adapt_epochs=1"),
    ),
    "kd": (0.25, ("method=kd", "model/teacher=resnet32x4", "model/student=cifar_resnet8")),
    "aver": (0.25, ("method=aver", "model/teacher=resnet32x4_wrn_40_2", "model/student=cifar_resnet8")),
}
"""The target, at most this share of the sweep without a bank, and the networks. ASIB's trials have an A-epoch, too."""
SAID = ("teachers_to_student_cost", "ratios", "processor_ratios", "target_ratio")
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
    before = psutil.Process().cpu_times()
    seconds = harness.step(
        "sweep",
        *(*common, f"sweep={root / 'sweep.yaml'}", f"trials={options.trials}", f"workers={options.workers}"),
        *(f"study={folder.name}", f"bank={bank}", f"bank_folder={folder}"),
    )
    after = psutil.Process().cpu_times()
    found = Study.open(f"sqlite:///{root / 'runs' / 'studies.db'}", folder.name).trials()
    trials = [trial for trial in found if trial.state.name == "COMPLETE"]
    if len(trials) != options.trials:
        raise SystemExit(f"{len(trials)} of {options.trials} trials completed: see {root}")
    runs = [from_folder(Path(trial.user_attrs["folder"])) for trial in trials]
    return {
        "bank": bank,
        "seconds": round(seconds, 1),
        "processor_seconds": round(sum(after[2:4]) - sum(before[2:4]), 1),
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
    target, own = METHODS[options.method]
    common = [*RUN, *own, epochs, f"dataset.path={data}", f"output_dir={root / 'runs'}"]
    common += ["optim.use_amp=true"] if options.amp else []
    harness.step("finetune", *common)
    sweeps = {bank: partial(study, root, common, options, bank) for bank in ("off", "auto")}
    rounds = interleaved(sweeps, options.rounds)
    macs = rounds["off"][0]["macs_per_image"]
    teachers = sum(v for k, v in macs.items() if k.startswith("teacher_"))

    def of(what: str) -> dict[str, Any]:
        return ratios(*([one[what] for one in rounds[bank]] for bank in ("auto", "off")))

    return {
        "trials": options.trials,
        "workers": options.workers,
        "images": options.images,
        "method": options.method,
        "words": own,
        "epochs": options.epochs + (options.method == "asib"),
        "precision": "bfloat16" if options.amp else "float32",
        # multiply-accumulates of their forward passes to those of its training pass (three forward)
        "teachers_to_student_cost": round(teachers / (3 * macs["student"]), 2),
        "required_cost": COST,
        "target_ratio": target,
        "ratios": of("seconds"),
        "processor_ratios": of("processor_seconds"),
        "rounds": rounds,
    }


def main() -> None:
    parser = harness.parser(__doc__, "output")
    parser.add_argument("--method", choices=METHODS, default="asib")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--images", type=int, default=640, help="a tenth is held out")
    parser.add_argument("--epochs", type=int, default=2, help="B-epochs of a trial")
    parser.add_argument("--workers", type=int, default=1, help="with several the bank is built ahead")
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    options = parser.parse_args()
    result = harness.described("timm")
    with tempfile.TemporaryDirectory(prefix="asib-bank-") as folder:
        result |= measure(Path(folder), options)
    print(json.dumps({k: result[k] for k in SAID}, indent=2))
    harness.write(f"bank_{options.method}", result, options.output)


if __name__ == "__main__":
    main()
